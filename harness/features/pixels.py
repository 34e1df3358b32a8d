"""The images themselves, for metrics of pixels and of image-text pairs: type `pixels`."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from harness.config.jobs import FeatureJob
from harness.config.schema import FeatureSettings
from harness.data.datasets import Dataset
from harness.errors import UserError
from harness.features.base import BLOCK, FEATURES, FeatureExtractor, captions_of
from harness.io.records import FeatureRecord
from harness.registry import plugin_errors


class ImageBatch(NamedTuple):
    """A few images, the input of a per-image metric. pixels: uint8 `(B, C, H, W)` on the host.
    texts: the prompt of each image, or its class's caption; None if unknown. device: of the job."""

    pixels: Tensor
    texts: list[str] | None
    device: str


class PerImage(NamedTuple):
    """A function of an `ImageBatch` that returns a number for each image, `(B,)`. file: of its
    plug-in. needs_texts: it is not called for images without texts."""

    function: Callable[[ImageBatch], Tensor]
    file: Path | None
    needs_texts: bool


@FEATURES.register("pixels")
class PixelExtractor(FeatureExtractor):
    """No network and no features, so no distances. Its outputs are the values of per-image metrics,
    computed block by block, and the pixels if a metric needs all of them; `functions` and
    `stores_pixels` are set before scoring."""

    class Settings(FeatureSettings):
        """caption: the text of a class, by its name, in a data set without prompts."""

        type: Literal["pixels"]
        caption: str = Field("a photo of a {}", pattern=r"^[^{}]*\{\}[^{}]*$")

    provided = frozenset({"pixels", "texts"})

    def __init__(self, name: str, settings: FeatureSettings):
        super().__init__(name, settings)
        self.functions: Mapping[str, PerImage] = {}
        self.stores_pixels = False
        self.job_device = "cpu"

    def make(self, job: FeatureJob) -> FeatureRecord:
        record = FeatureRecord(name=job.name, sha256="none", settings=job.settings.model_dump())
        record.write(job.folder / "features.json")
        return record

    def load(self, record: FeatureRecord, folder: Path, dataset: Dataset, device: str) -> None:
        self.job_device, self.captions = device, captions_of(dataset, self.settings.caption)
        if self.captions:
            caption = "the prompt" if dataset.evaluation_prompts else self.settings.caption
            self.details = {"caption": caption}

    def extract(self, pixels: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        texts = None
        if labels is not None and self.captions:
            texts = [self.captions[label] for label in labels.tolist()]
        outputs = {"pixels": pixels.clone()} if self.stores_pixels else {}
        for name, metric in self.functions.items():
            if texts is not None or not metric.needs_texts:
                outputs[name] = self._values(name, metric, pixels, texts)
        return outputs

    def _values(
        self, name: str, metric: PerImage, pixels: Tensor, texts: list[str] | None
    ) -> Tensor:
        """float64 `(B,)`."""
        values, what = [], f"metric {name!r}"
        for start in range(0, len(pixels), BLOCK):
            rows = slice(start, start + BLOCK)
            copy = pixels[rows].clone()  # a function may change it in place
            batch = ImageBatch(copy, texts and texts[rows], self.job_device)
            with plugin_errors(metric.file, what):
                found = torch.as_tensor(metric.function(batch)).detach().cpu().double()
            place = f" ({metric.file})" if metric.file else ""
            if found.shape != (count := len(batch.pixels),):
                message = f"returned shape {tuple(found.shape)} for {count} images, not ({count},)"
                raise UserError(f"{what}{place}: {message}", "outputs")
            if not found.isfinite().all():
                raise UserError(f"{what}{place}: a value is not finite", "not-finite")
            values.append(found)
        return torch.cat(values)
