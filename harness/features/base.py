"""The base classes of feature networks and their registry.

A kind of feature network is one file, in this package or a plug-in. It registers a subclass of
`PretrainedExtractor` (published weights) or `harness.features.train.TrainedExtractor` (weights
trained in the workflow) under the `type` by which experiments name it. Everything that other
packages need to know about a kind is a method or attribute of its class.
"""

from __future__ import annotations

import contextlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import torch
from pydantic import ConfigDict, field_validator
from pydantic_core import PydanticCustomError
from torch import Tensor, nn
from torch.nn.functional import interpolate

from harness.config.jobs import FeatureJob
from harness.config.schema import FeatureSettings
from harness.data.datasets import Dataset
from harness.errors import Problem, UserError, did_you_mean
from harness.io.artifacts import sha256_file
from harness.io.downloads import source_problems
from harness.io.records import FeatureRecord
from harness.registry import Registry

logger = logging.getLogger(__name__)

BLOCK = 64  # images per forward pass of a pretrained network
NO_WEIGHTS = "no weights"  # status of metrics without their network


class TextEncoder(Protocol):
    """Per-token embeddings of texts. sha256: of the weights. limit: tokens per text."""

    sha256: str
    limit: int

    def encode(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """A condition of one batch: "embeddings" `(B, limit, width)`."""

    def truncated(self, texts: Sequence[str]) -> int:
        """How many of the texts have more than `limit` tokens."""


class FeatureExtractor(ABC):
    """A feature network of an experiment, loaded and ready.

    Class attributes:
    Settings: its keys in an experiment file, with `type` as a literal.
    trained: its weights come from training on the experiment's data, in the workflow.
    has_feature_maps: the network has `maps(x)` and `map_channels`, so that a discriminator can use
    it (see `FeatureMaps`).

    Attributes:
    network: None if the weights are unavailable.
    sha256: hash of the weights file, known for some networks even if it is unavailable.
    unavailable: why there are no weights; missing: the same for single outputs.
    resize: how images are brought to the network's input size.
    pretraining: data sets of the published weights' training.
    alias: its name in the records of students that were trained against it, if not `name`.
    details: further settings that belong to the protocol of its numbers.
    provided: `provides` for its settings.
    """

    Settings: ClassVar[type[FeatureSettings]]
    trained: ClassVar[bool] = False
    has_feature_maps: ClassVar[bool] = False
    resize: str = "none"
    pretraining: tuple[str, ...] = ()
    alias: str | None = None

    def __init__(
        self,
        name: str,
        settings: FeatureSettings,
        network: nn.Module | None = None,
        sha256: str = "unknown",
    ):
        self.name, self.settings, self.network, self.sha256 = name, settings, network, sha256
        self.unavailable: str | None = None
        self.missing: dict[str, str] = {}
        self.details: dict[str, Any] = {}
        self.provided = self.provides(settings)

    @classmethod
    @abstractmethod
    def provides(cls, settings: FeatureSettings) -> frozenset[str]:
        """What metrics may require: the names of its outputs, and its traits.

        Traits: the name of its Fréchet distance ("fd", or "fid-..." for Inception); "data-classes"
        (probabilities of the data set's classes), "inception", "image-text" (a CLIP),
        "short-captions" (a CLIP trained on the data set).
        """

    @classmethod
    @abstractmethod
    def build(cls, settings: FeatureSettings, dataset: Dataset) -> nn.Module:
        """The network with random weights; it works on the meta device, too."""

    @classmethod
    @abstractmethod
    def make(cls, job: FeatureJob) -> FeatureRecord:
        """Train or fetch the network and write `features.json`."""

    @classmethod
    @abstractmethod
    def load(cls, record: FeatureRecord, folder: Path, dataset: Dataset, device: str) -> Self:
        """The extractor that `make` left in a folder."""

    @classmethod
    def check(cls, name: str, settings: FeatureSettings, files: bool) -> list[Problem]:
        """Errors that the schema cannot express. `files`: local files must exist."""
        return []

    @classmethod
    def text_shape(cls, settings: FeatureSettings) -> tuple[int, int] | None:
        """Tokens and width of its text embeddings; None if it is not a text encoder."""
        return None

    def text_encoder(self) -> TextEncoder:
        raise UserError(f"{self.name} is not a text encoder", "no-text-encoder")

    @abstractmethod
    def extract(self, pixels: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Outputs per image, on the host: "features" `(B, D)` and whatever else it provides.

        pixels: uint8 `(B, C, H, W)` at the data set's resolution. labels: the requested class or
        prompt of each image, int64 `(B,)`, if known.
        """

    @property
    def hashes(self) -> dict[str, str]:
        """Hashes of all weights that its outputs depend on."""
        return {"weights": self.sha256}

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device


FEATURES: Registry[type[FeatureExtractor]] = Registry("feature network", "harness.features")


class _UnknownSettings(FeatureSettings):
    """Placeholder for a section without a known `type`; validation always fails."""

    model_config = ConfigDict(extra="ignore")

    @field_validator("type")
    @classmethod
    def _unknown(cls, kind: str) -> str:
        message = f"unknown feature network {kind!r}{did_you_mean(kind, FEATURES)}"
        raise PydanticCustomError("unknown-name", "{message}", {"message": message})


def settings_class(raw: Any) -> type[FeatureSettings]:
    """The class that validates the section of a feature network."""
    kind = raw.get("type") if isinstance(raw, Mapping) else None
    return FEATURES[kind].Settings if kind in FEATURES else _UnknownSettings


def parse_settings(raw: Any) -> FeatureSettings:
    """Settings of a feature network, validated by its own class; errors are a pydantic
    `ValidationError`."""
    return settings_class(raw).model_validate(raw)


def provides(settings: FeatureSettings) -> frozenset[str]:
    """Outputs and traits of a feature network (`FeatureExtractor.provides`)."""
    return FEATURES[settings.type].provides(settings)


def load_extractor(folder: Path, dataset: Dataset, device: str = "cpu") -> FeatureExtractor:
    """The extractor in `features/<name>/`."""
    record = FeatureRecord.read(folder / "features.json")
    return FEATURES[record.settings["type"]].load(record, folder, dataset, device)


class FeatureMaps(nn.Module):
    """A network with feature maps as the input of a discriminator: calling it returns `maps(x)`,
    `(B, C_i, H_i, W_i)` from fine to coarse."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network, self.map_channels = network, network.map_channels

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.network.maps(x)


# -- published weights ----------------------------------------------------------------------------


class PretrainedSettings(FeatureSettings):
    """weights: a local file instead of the download."""

    weights: str | None = None


class PretrainedExtractor(FeatureExtractor):
    """A feature network with published weights, frozen, with a fixed input size.

    A subclass gives `fetch`, `build`, `fill` and `outputs`; also `inputs`, unless a resize and a
    normalisation are enough, and `known_sha256`, if the hash is not a setting.
    """

    size: int  # height and width of the input

    def __init__(
        self,
        name: str,
        settings: FeatureSettings,
        network: nn.Module | None = None,
        sha256: str | None = None,
    ):
        super().__init__(name, settings, network and network.eval().requires_grad_(False))
        self.sha256 = sha256 or self.known_sha256(settings) or self.sha256

    @classmethod
    def known_sha256(cls, settings: FeatureSettings) -> str | None:
        """Hash that the weights must have, if it is known: by default a setting."""
        return getattr(settings, "sha256", None)

    @classmethod
    def check(cls, name: str, settings: FeatureSettings, files: bool) -> list[Problem]:
        if settings.weights is None:
            return []
        key, sha256 = f"features.{name}", cls.known_sha256(settings)
        return source_problems(
            f"{key}.weights", settings.weights, sha256, sha256_key=f"{key}.sha256", required=files
        )

    @classmethod
    @abstractmethod
    def fetch(cls, settings: FeatureSettings) -> Path:
        """The file of the weights, downloaded if necessary; a `UserError` if that fails."""

    @classmethod
    def fill(cls, network: nn.Module, path: Path) -> None:
        """Load the weights in a file."""
        raise NotImplementedError

    @classmethod
    def load_network(cls, settings: FeatureSettings, path: Path, dataset: Dataset) -> nn.Module:
        """The network with the weights in a file; a `UserError` if they do not fit."""
        network = cls.build(settings, dataset)
        with reading_weights(path, settings.type):
            cls.fill(network, path)
        return network

    @classmethod
    def fetch_parts(cls, settings: FeatureSettings) -> dict[str, str]:
        """Fetch weights of optional outputs; returns those that are missing, with the reason."""
        return {}

    @classmethod
    def make(cls, job: FeatureJob) -> FeatureRecord:
        """Fetch the weights. If that fails, the record says why: the network's metrics are marked
        as unavailable, and everything else continues."""
        record = FeatureRecord(name=job.name, settings=job.settings.model_dump())
        try:
            path = cls.fetch(job.settings)
        except UserError as error:
            logger.warning("%s is unavailable: %s", job.name, error)
            record.unavailable, record.reason = NO_WEIGHTS, str(error)
        else:
            record.file = path.name
            record.sha256 = cls.known_sha256(job.settings) or sha256_file(path)
        for output, reason in cls.fetch_parts(job.settings).items():
            logger.warning("%s: %s is unavailable: %s", job.name, output, reason)
            record.missing[output] = NO_WEIGHTS
        record.write(job.folder / "features.json")
        return record

    @classmethod
    def load(cls, record: FeatureRecord, folder: Path, dataset: Dataset, device: str) -> Self:
        settings = parse_settings(record.settings)
        extractor = cls(record.name, settings, None, record.sha256)
        extractor.unavailable, extractor.missing = record.unavailable, record.missing
        if extractor.unavailable is None:
            network = cls.load_network(settings, cls.fetch(settings), dataset).to(device)
            extractor.network = network.eval().requires_grad_(False)
        extractor.prepare(dataset)
        return extractor

    def prepare(self, dataset: Dataset) -> None:
        """Set up what depends on the data set, such as captions."""

    def mean_and_std(self) -> tuple[Sequence[float], Sequence[float]]:
        """Per channel, of pixels in [0, 1], as in the network's training."""
        config = self.network.pretrained_cfg
        return config["mean"], config["std"]

    def inputs(self, pixels: Tensor) -> Tensor:
        """The network's input, `(B, 3, size, size)` on its device."""
        x = resized(pixels, self.size).to(self.device).float() / 255
        mean, std = (torch.tensor(v).view(3, 1, 1).to(x.device) for v in self.mean_and_std())
        return (x - mean) / std

    @abstractmethod
    def outputs(self, x: Tensor) -> dict[str, Tensor]:
        """Outputs of the network for one block of inputs."""

    def compare(self, features: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
        """Further outputs, from all features, on the host."""
        return {}

    @torch.no_grad()
    def extract(self, pixels: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        with full_precision():
            blocks = [self.outputs(self.inputs(block)) for block in pixels.split(BLOCK)]
        outputs = {key: torch.cat([block[key] for block in blocks]).cpu() for key in blocks[0]}
        return outputs | self.compare(outputs["features"], labels)


def full_precision() -> contextlib.AbstractContextManager:
    """No TensorFloat-32 convolutions: features must not depend on the GPU."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


RESIZE = "before the network, bicubic with antialiasing, 8 bits"


def resized(pixels: Tensor, size: int) -> Tensor:
    """uint8 `(B, 1 or 3, H, W)` -> `(B, 3, size, size)`, bicubic with antialiasing: PIL's resize up
    to about one level."""
    rgb = pixels.expand(-1, 3, -1, -1)
    if rgb.shape[2:] == (size, size):
        return rgb
    return interpolate(rgb.cpu(), (size, size), mode="bicubic", antialias=True)


@contextlib.contextmanager
def reading_weights(path: Path, network: str) -> Iterator[None]:
    """Turn any error of reading a file of weights into one line."""
    try:
        yield
    except Exception as error:  # a foreign file may fail in any way
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        # torch's list of differences comes after a title.
        reason = lines[len(lines) > 1 and lines[0].startswith("Error(s)")] if lines else repr(error)
        # torch's own messages recommend to load the file unsafely.
        if "TorchScript" in reason:
            reason = "it is a TorchScript archive; use a file in the format safetensors"
        elif "weights_only" in reason:
            reason = "it holds other objects than tensors"
        raise UserError(
            f"{path} does not hold the weights of {network}: {reason[:200]}", "weights"
        ) from None


def fetch_from_hub(repository: str, file: str, instead: str) -> Path:
    """A file of the Hugging Face hub, through its cache. `instead`: what to do without the hub."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, file))
    except OSError:
        raise UserError(
            f"could not download {file} of {repository} (Hugging Face); {instead}", "download"
        ) from None
