"""CLIPs of open_clip: type `open-clip`."""

import logging
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from harness.config.jobs import FeatureJob
from harness.config.schema import DataSection, Sha256
from harness.data.datasets import Dataset
from harness.errors import Problem, UserError
from harness.features import base
from harness.features.aesthetic import laion_head
from harness.io.downloads import fetch
from harness.io.records import FeatureRecord

logger = logging.getLogger(__name__)

PREFIX = "A photo depicts "  # before each caption in CLIPScore (Hessel et al. 2021)
SIMILARITIES = {"text_similarity": "", "prefixed_similarity": PREFIX}
# OpenAI's weights, converted to safetensors by the authors of timm: model -> repository of the hub.
OPENAI = {
    "ViT-B-32-quickgelu": "timm/vit_base_patch32_clip_224.openai",
    "ViT-L-14-quickgelu": "timm/vit_large_patch14_clip_224.openai",
    "ViT-L-14-336-quickgelu": "timm/vit_large_patch14_clip_336.openai",
}
AESTHETIC = "vit-l-14-quickgelu-openai"  # the network of LAION's heads


@base.FEATURES.register("open-clip")
class OpenCLIPExtractor(base.PretrainedExtractor):
    """Image embeddings of length 1 `(B, D)`; with captions (of classes, or the prompts) also the
    similarity to the own one, plain and after Hessel's prefix; with LAION's heads also ratings."""

    class Settings(base.PretrainedSettings):
        """pretrained: open_clip's name of the weights. OpenAI's are downloaded; others are a file
        or an address with its sha256. caption: of a class, by its name."""

        type: Literal["open-clip"]
        model: Literal[*OPENAI, "ViT-H-14", "ViT-g-14", "ViT-bigG-14"]
        pretrained: str = "openai"
        sha256: Sha256 | None = None
        caption: str = Field("a photo of a {}", pattern=r"^[^{}]*\{\}[^{}]*$")
        aesthetic: list[Literal["v1", "v2"]] = Field([], description="LAION's heads, for ViT-L-14")

    @property
    def provided(self) -> frozenset[str]:
        heads = (f"aesthetic_{version}" for version in self.settings.aesthetic)
        return frozenset({"features", "image-text", "fd", *SIMILARITIES, *heads})

    def check(self, data: DataSection | None, files: bool) -> Iterable[Problem]:
        yield from super().check(data, files)
        key, settings = f"features.{self.name}", self.settings
        known = settings.pretrained == "openai" and settings.model in OPENAI
        column = f"{settings.model}-{settings.pretrained}".lower()
        if settings.weights is None and not known:
            message = "missing; only OpenAI's weights are downloaded without a file or an address"
            yield Problem(f"{key}.weights", "missing-key", message)
        if not self.name.startswith(column):
            message = f"the name must begin with {column}, the heading of its columns"
            yield Problem(key, "name", message)
        if settings.aesthetic and column != AESTHETIC:
            message = "LAION's heads need ViT-L-14-quickgelu with OpenAI's weights"
            yield Problem(f"{key}.aesthetic", "unsupported", message)

    def fetch(self) -> Path:
        if self.settings.weights is not None:
            return super().fetch()
        file = OPENAI[self.settings.model], "open_clip_model.safetensors"
        path = base.fetch_from_hub(*file, "name a local copy under weights")
        return fetch(str(path), self.known_sha256)

    def make(self, job: FeatureJob) -> FeatureRecord:
        record = super().make(job)
        for version in self.settings.aesthetic:
            try:
                laion_head(version)
            except UserError as error:
                logger.warning("%s: aesthetic_%s is unavailable: %s", job.name, version, error)
                record.missing[f"aesthetic_{version}"] = base.NO_WEIGHTS
        record.write(job.folder / "features.json")
        return record

    def load_network(self, path: Path) -> nn.Module:
        import open_clip

        network = open_clip.create_model(self.settings.model, pretrained=None)
        open_clip.load_checkpoint(network, str(path), weights_only=True)  # or safetensors
        return network

    def load(self, record: FeatureRecord, folder: Path, dataset: Dataset, device: str) -> None:
        super().load(record, folder, dataset, device)
        settings = self.settings
        self.pretraining = (f"clip-{settings.pretrained}",)
        caption = "the prompt" if dataset.evaluation_prompts else settings.caption
        self.details = settings.model_dump(include={"model", "pretrained"}) | {"caption": caption}
        if self.network is None:
            return
        import open_clip

        self.tokenizer = open_clip.get_tokenizer(settings.model)
        self.embed_block = cache(self.embed_block)
        outputs = {f"aesthetic_{version}": version for version in settings.aesthetic}
        self.heads = {o: laion_head(v) for o, v in outputs.items() if o not in self.missing}
        self.captions = base.captions_of(dataset, settings.caption)
        if self.captions:
            for key, prefix in (("truncated_captions", ""), ("truncated_after_prefix", PREFIX)):
                self.details[key] = f"{self.truncated(prefix)} of {len(self.captions)}"

    @property
    def size(self) -> int:
        return self.network.visual.image_size[0]

    def mean_and_std(self) -> tuple[Sequence[float], Sequence[float]]:
        from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

        return OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    def outputs(self, x: Tensor) -> dict[str, Tensor]:
        return {"features": self.network.encode_image(x, normalize=True)}

    def embed_block(self, prefix: str, number: int) -> Tensor:
        """Embeddings of a fixed block of captions, computed once, so that their rounding does not
        depend on the batch."""
        block = self.captions[number * base.BLOCK :][: base.BLOCK]
        tokens = self.tokenizer([prefix + caption for caption in block])
        return self.network.encode_text(tokens.to(self.device), normalize=True).cpu()

    def finish(self, outputs: dict[str, Tensor], labels: Tensor | None) -> dict[str, Tensor]:
        features = outputs["features"]
        outputs |= {name: head(features) for name, head in self.heads.items()}
        if self.captions and labels is not None:
            places = [divmod(label, base.BLOCK) for label in labels.tolist()]
            for name, prefix in SIMILARITIES.items():
                texts = torch.stack([self.embed_block(prefix, n)[row] for n, row in places])
                outputs[name] = (features * texts).sum(dim=1)
        return outputs

    def truncated(self, prefix: str = "") -> int:
        """How many captions, after the prefix, are longer than the network's context."""
        length = self.tokenizer.context_length - 2  # start and end of the text
        return sum(len(self.tokenizer.encode(prefix + c)) > length for c in self.captions)
