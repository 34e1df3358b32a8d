"""A small CLIP (open_clip's model class) trained on the data set: type `clip`."""

from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from harness.config.schema import DataSection
from harness.context import Context
from harness.data.datasets import Dataset
from harness.errors import Problem
from harness.features import aesthetic
from harness.features.base import FEATURES
from harness.features.train import TrainedExtractor, TrainedSettings, augmented
from harness.io.artifacts import load_tensors
from harness.io.records import FeatureRecord
from harness.transfers import to_device

CONTEXT_LENGTH = 16  # tokens; the usual 77 would only cost time for short captions
HEAD_WIDTH = 16  # of the image transformer's attention


@cache
def tokenizer():
    """open_clip's byte-pair tokenizer; calling it with a list gives tokens, int64 `(N, 16)`."""
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer(context_length=CONTEXT_LENGTH)


class SmallCLIP(nn.Module):
    """open_clip's `CLIP` for images `(B, C, H, W)` in [-1, 1]; embeddings have length 1.
    `captions`: tokens, int64 `(conditions, wordings, 16)`, a few wordings for each class, or one
    for each prompt. `meaning`: `(conditions,)`, equal for captions that mean the same."""

    embed_dim = 64

    def __init__(self, dataset: Dataset, width: int):
        super().__init__()
        from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

        self.size = dataset.image_shape[1]
        sizes = {"image_size": self.size, "patch_size": 2 if self.size < 16 else 4}
        vision = CLIPVisionCfg(layers=3, width=2 * width, head_width=HEAD_WIDTH, **sizes)
        text = CLIPTextCfg(context_length=CONTEXT_LENGTH, width=2 * width, heads=4, layers=2)
        self.clip = CLIP(self.embed_dim, vision, text)
        if dataset.attributes:
            texts, meaning = list(dataset.prompts.texts), dataset.attributes.meanings()
        else:
            names, templates = dataset.class_names, dataset.caption_templates
            texts = [template.format(name) for name in names for template in templates]
            meaning = torch.arange(len(names))
        captions = tokenizer()(texts).view(len(meaning), -1, CONTEXT_LENGTH)
        self.register_buffer("captions", captions)
        self.register_buffer("meaning", meaning, persistent=False)

    def features(self, x: Tensor) -> Tensor:
        """Image embeddings `(B, 64)`, normalised."""
        x = x.expand(-1, 3, -1, -1)
        if x.shape[-1] != self.size:
            x = interpolate(x, size=self.size, mode="bilinear", antialias=True)
        return self.clip.encode_image(x, normalize=True)

    def token_features(self, tokens: Tensor) -> Tensor:
        """Embedding of each token, `(N, 16, width)`."""
        x = self.clip.token_embedding(tokens) + self.clip.positional_embedding
        return self.clip.ln_final(self.clip.transformer(x, attn_mask=self.clip.attn_mask))

    def class_features(self) -> Tensor:
        """Embedding of the first caption of each class or prompt, `(conditions, 64)`."""
        return self.clip.encode_text(self.captions[:, 0], normalize=True)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        """Scaled similarities `(B, N)`."""
        captions = self.clip.encode_text(tokens, normalize=True)
        return self.clip.logit_scale.exp() * self.features(x) @ captions.T


@FEATURES.register("clip")
class SmallCLIPExtractor(TrainedExtractor):
    """Image embeddings, their similarity to the requested caption, and a trained aesthetic head.
    Its text transformer is a `TextEncoder`."""

    class Settings(TrainedSettings):
        type: Literal["clip"]

    provided = frozenset(
        {"features", "text_similarity", "aesthetic", "image-text", "short-captions", "fd"}
    )
    limit = CONTEXT_LENGTH

    @property
    def text_shape(self) -> tuple[int, int]:
        return self.limit, 2 * self.settings.width

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> dict[str, Tensor]:
        tokens = tokenizer()(list(texts))
        # Pad with the end-of-text token, as Stable Diffusion does: CLIP learns to summarise the
        # text there, while the embedding of open_clip's padding (zeros) is never trained.
        end = tokens.argmax(dim=1, keepdim=True)  # end-of-text has the greatest number
        tokens = torch.where(torch.arange(self.limit) > end, tokens.gather(1, end), tokens)
        return {"embeddings": self.network.token_features(tokens)}

    def truncated(self, texts: Sequence[str]) -> int:
        length = self.limit - 2  # without start and end of the text
        return sum(len(tokenizer().encode(text)) > length for text in texts)

    def check(self, data: DataSection | None, files: bool) -> Iterable[Problem]:
        yield from super().check(data, files)
        width, heads = self.settings.width, 2 * self.settings.width // HEAD_WIDTH
        if width % 2 or not heads or 2 * width % heads:
            message = f"must be a multiple of {HEAD_WIDTH // 2}, not {width}"
            yield Problem(f"features.{self.name}.width", "invalid-value", message)

    def build(self, dataset: Dataset) -> SmallCLIP:
        return SmallCLIP(dataset, self.settings.width)

    def loss(self, context: Context) -> Tensor:
        """CLIP's loss in both directions, with several matches in a batch: an image matches every
        caption of its class (or of its caption's meaning), and the targets share the mass
        (UniCL, Yang et al. 2022)."""
        clip = context.networks["features"]
        x, labels = context.real()
        meaning, wordings = clip.meaning[labels], clip.captions.shape[1]
        wording = (context.uniform("template") * wordings).long().clamp_max(wordings - 1)
        logits = clip(augmented(context, x), clip.captions[labels, wording])
        same = (meaning[:, None] == meaning[None]).float()
        target = same / same.sum(dim=1, keepdim=True)
        return (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2

    def correct(self, x: Tensor, labels: Tensor) -> Tensor:
        """Whether the nearest caption is one of the image's class, or means the same as its own."""
        clip = self.network
        nearest = (clip.features(x) @ clip.class_features().T).argmax(dim=1)
        return clip.meaning[nearest] == clip.meaning[labels]

    def answers(self, dataset: Dataset) -> Tensor:
        if dataset.attributes:
            return dataset.attributes.meanings()
        return super().answers(dataset)

    def load(self, record: FeatureRecord, folder: Path, dataset: Dataset, device: str) -> None:
        super().load(record, folder, dataset, device)
        self.hashes["head"] = record.aesthetic["sha256"]
        weights = load_tensors(folder / aesthetic.WEIGHTS, self.hashes["head"], owner=folder)
        head = aesthetic.new_head(SmallCLIP.embed_dim)
        head.load_state_dict(weights)
        self.head = head.eval().requires_grad_(False).to(device)
        with torch.no_grad():
            self.class_features = self.network.class_features()

    def outputs(self, x: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
        features = self.network.features(x)
        outputs = {"features": features, "aesthetic": self.head(features)}
        if labels is not None:
            captions = self.class_features[to_device(labels, self.device)]
            outputs["text_similarity"] = (features * captions).sum(dim=1)
        return outputs
