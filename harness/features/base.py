"""The base classes of feature networks and their registry. A kind of network is a subclass of
`PretrainedExtractor` (published weights) or `train.TrainedExtractor` (trained in the workflow), in
this package or a plug-in, registered under the `type` by which experiments name it."""

import contextlib
import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol, get_args

import torch
from torch import Tensor, nn

from harness.config.jobs import FeatureJob
from harness.config.schema import DataSection, FeatureSettings
from harness.data import datasets
from harness.data.datasets import Dataset
from harness.errors import Problem, UserError
from harness.features.resize import bicubic
from harness.io.artifacts import sha256_file
from harness.io.downloads import fetch, load_pickled, source_problems
from harness.io.records import FeatureRecord
from harness.precision import full_precision, set_precision
from harness.registry import Registry, plugin_errors
from harness.transfers import HostCopy, is_gpu

logger = logging.getLogger(__name__)

# Images per forward pass of a pretrained network. On a GPU: a block of samples, at its default.
BLOCK, GPU_BLOCK = 64, 256
NO_WEIGHTS = "no weights"  # status of metrics without their network


Outputs = Callable[[], dict[str, Tensor]]


class TextEncoder(Protocol):
    """Per-token embeddings of texts. sha256: of the weights. limit: tokens per text."""

    sha256: str
    limit: int

    def encode(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """A condition of one batch: "embeddings" `(B, limit, width)`."""

    def truncated(self, texts: Sequence[str]) -> int:
        """How many of the texts have more than `limit` tokens."""


class FeatureExtractor(ABC):
    """A feature network of an experiment. It has no network until `load`. Features must not depend
    on the GPU, so `load`, `extract` and `start` of every subclass compute in full precision."""

    Settings: ClassVar[type[FeatureSettings]]  # its keys in an experiment, with `type` as a literal
    trained: ClassVar[bool] = False  # in the workflow, on the experiment's data
    has_feature_maps: ClassVar[bool] = False  # `maps(x)` and `map_channels`, for discriminators

    # All others may be properties.
    # What metrics may require: names of outputs, the name of its Fréchet distance ("fd", or
    # "fid-..." for Inception), and the traits "data-classes" (probabilities of the data set's
    # classes), "inception", "image-text" (a CLIP), "short-captions" (a CLIP of this data set),
    # "pixels" and "texts" (the images and their texts, see `harness.features.pixels`).
    provided: frozenset[str]
    unavailable: str | None = None  # why there are no weights; `missing`: the same per output
    resize: str = "none"  # how images are brought to the network's input size
    pretraining: tuple[str, ...] = ()  # data sets of the published weights' training
    alias: str | None = None  # another name of it in the records of students trained against it
    captions: Sequence[str] = ()  # the text of each condition of the samples, if known
    text_shape: tuple[int, int] | None = None  # tokens and width, if it is a `TextEncoder`, too
    plugin: Path | None = None  # the plug-in file that registered it
    sha256: str  # of the weights
    hashes: dict[str, str]  # of all weights that its outputs depend on

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        if "extract" in vars(cls) and "start" not in vars(cls):
            cls.start = FeatureExtractor.start  # an inherited one would leave out the new `extract`
        for name in {"load", "extract", "start"} & vars(cls).keys():
            setattr(cls, name, full_precision()(getattr(cls, name)))

    def __init__(self, name: str, settings: FeatureSettings):
        self.name, self.settings = name, settings
        self.network: nn.Module | None = None
        self.known_sha256 = getattr(settings, "sha256", None)  # required, of the weights
        self.missing: dict[str, str] = {}
        self.details: dict[str, Any] = {}  # other settings of the protocol of its numbers

    def check(self, data: DataSection | None, files: bool) -> Iterable[Problem]:
        """Errors that the schema cannot express. `files`: local files must exist."""
        return ()

    @abstractmethod
    def make(self, job: FeatureJob) -> FeatureRecord:
        """Train or fetch the network and write `features.json`."""

    @abstractmethod
    def load(self, record: FeatureRecord, folder: Path, dataset: Dataset, device: str) -> None:
        """Load the network that `make` left in a folder."""

    @abstractmethod
    def extract(self, pixels: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Outputs per image, on the host: "features" `(B, D)` and whatever else it provides.
        pixels: uint8 `(B, C, H, W)` at the data set's resolution. labels: the requested class or
        prompt of each image, int64 `(B,)`, if known."""

    @torch.no_grad()
    def start(self, pixels: Tensor, labels: Tensor | None = None) -> Outputs:
        """Start to `extract`; the result waits for the outputs and returns them. By default nothing
        is left to wait for."""
        outputs = self.extract(pixels, labels)
        return lambda: outputs

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device


class NetworkExtractor(FeatureExtractor):
    """A feature network that leaves its work to the device: a GPU goes on while the host starts the
    next block."""

    @abstractmethod
    def launch(self, pixels: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
        """The outputs on the network's device. Nothing waits for the device."""

    def finish(self, outputs: dict[str, Tensor], labels: Tensor | None) -> dict[str, Tensor]:
        """All outputs from those of `launch`, on the host."""
        return outputs

    @torch.no_grad()
    def start(self, pixels: Tensor, labels: Tensor | None = None) -> Outputs:
        launched = self.launch(pixels, labels)
        names, copy = list(launched), HostCopy(*launched.values())

        @torch.no_grad()
        @full_precision()
        def outputs() -> dict[str, Tensor]:
            return self.finish(dict(zip(names, copy.wait(store=True), strict=True)), labels)

        return outputs

    def extract(self, pixels: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        return NetworkExtractor.start(self, pixels, labels)()


def _lacks(name: str, extractor: type[FeatureExtractor]) -> str | None:
    """What a class lacks to be registered under a name."""
    settings = getattr(extractor, "Settings", None)
    if not (isinstance(settings, type) and issubclass(settings, FeatureSettings)):
        return "has no class Settings, a subclass of FeatureSettings"
    names = get_args(settings.model_fields["type"].annotation)
    if names and name not in names:
        return f"has Settings.type {', '.join(map(repr, names))}; use Literal[{name!r}]"
    return None


FEATURES: Registry[type[FeatureExtractor]] = Registry(
    "feature network", "harness.features", FeatureExtractor, _lacks
)


def settings_class(raw: Any) -> type[FeatureSettings]:
    """The class that validates the section of a feature network; a `UserError` about its `type`."""
    if not isinstance(raw, Mapping):
        return FeatureSettings
    if raw.get("type") is None:
        raise UserError(f"missing; known: {', '.join(sorted(FEATURES))}", "missing-key")
    return FEATURES[str(raw["type"])].Settings


def parse_settings(raw: Any) -> FeatureSettings:
    """Validated settings of a feature network."""
    return settings_class(raw).model_validate(raw)


def new_extractor(name: str, settings: FeatureSettings) -> FeatureExtractor:
    """The extractor of a feature network, without its weights."""
    file = FEATURES.plugin(settings.type)
    with plugin_errors(file, f"feature network {settings.type!r}"):
        extractor = FEATURES[settings.type](name, settings)
        extractor.plugin, _ = file, extractor.provided
    return extractor


def provides(settings: FeatureSettings) -> frozenset[str]:
    """Outputs and traits of a feature network (`FeatureExtractor.provided`)."""
    return new_extractor("", settings).provided


def load_extractor(folder: Path, dataset: Dataset, device: str = "cpu") -> FeatureExtractor:
    """The extractor in `features/<name>/`."""
    record = FeatureRecord.read(folder / "features.json")
    extractor = new_extractor(record.name, parse_settings(record.settings))
    extractor.sha256 = record.sha256 or extractor.known_sha256 or "unknown"
    extractor.hashes = {"weights": extractor.sha256}
    with errors_in(extractor):
        extractor.load(record, folder, dataset, device)
    return extractor


def errors_in(extractor: FeatureExtractor) -> contextlib.AbstractContextManager[None]:
    """A context in which an error of a plug-in's feature network becomes one line."""
    return plugin_errors(extractor.plugin, f"features.{extractor.name}")


def start_checked(
    extractor: FeatureExtractor, pixels: Tensor, labels: Tensor | None = None
) -> Outputs:
    """`extractor.start`; its outputs must have one row per image, and features two dimensions
    (otherwise a `UserError`, code "outputs")."""

    def outputs() -> dict[str, Tensor]:
        with errors_in(extractor):
            found = {name: output.detach().cpu() for name, output in waiting().items()}
        what, reason = "extract returned", None
        if "features" in extractor.provided and "features" not in found:
            reason = f"{what} no 'features', which it provides"
        for name, output in found.items():
            shape = tuple(output.shape)
            if shape[:1] != (len(pixels),):
                reason = f"{what} {name!r} of shape {shape} for {len(pixels)} images"
            elif name == "features" and not (output.ndim == 2 and output.is_floating_point()):
                reason = f"{what} 'features' of shape {shape} and {output.dtype}, not (B, D) floats"
        if reason is not None:
            place = f" ({extractor.plugin})" if extractor.plugin else ""
            raise UserError(f"features.{extractor.name}{place}: {reason}", "outputs")
        return found

    with errors_in(extractor):
        waiting = extractor.start(pixels, labels)
    return outputs


def make_features(job: FeatureJob) -> FeatureRecord:
    """Train or fetch a feature network: leaves `features/<name>/` with its `features.json`."""
    set_precision(job.device, static_shapes=True)
    extractor = new_extractor(job.name, job.settings)
    with errors_in(extractor):
        record = extractor.make(job)
    if extractor.plugin and record is not None and not record.unavailable:
        _try_out(job)
    return record


def _try_out(job: FeatureJob) -> None:
    """Load a plug-in's network and extract from two images, so that its errors appear before
    anything is trained."""
    if not (job.data / "data.json").is_file():
        return  # a stage by hand, before that of the data
    dataset = datasets.load(job.data)
    pixels = dataset.train.pixels[:2]
    if not len(pixels):
        pixels = torch.zeros(2, *dataset.image_shape, dtype=torch.uint8)
    labels = torch.zeros(len(pixels), dtype=torch.long) if dataset.num_evaluated else None
    start_checked(load_extractor(job.folder, dataset, job.device), pixels, labels)()


def captions_of(dataset: Dataset, template: str) -> tuple[str, ...]:
    """The text of each condition of the samples: the prompt, or the class's name in a template.
    Empty if a class has only a number, which is not a description."""
    names, prompts = dataset.class_names, dataset.evaluation_prompts
    if prompts:
        return prompts.texts
    return () if any(map(str.isdigit, names)) else tuple(map(template.format, names))


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
    weights: str | None = None  # a local file instead of the download


class PretrainedExtractor(NetworkExtractor):
    """A feature network with published weights, frozen, with a fixed input size. By default it
    fetches the file in its settings, and its inputs are resized and normalised."""

    size: int  # height and width of the input
    resize = "before the network, bicubic with antialiasing, 8 bits"

    def check(self, data: DataSection | None, files: bool) -> Iterable[Problem]:
        if self.settings.weights is None:
            return ()
        key, source = f"features.{self.name}", (self.settings.weights, self.known_sha256)
        options = {"sha256_key": f"{key}.sha256", "required": files}
        return source_problems(f"{key}.weights", *source, **options)

    def fetch(self) -> Path:
        """The file of the weights, downloaded if necessary; a `UserError` if that fails."""
        return fetch(self.settings.weights, self.known_sha256)

    @abstractmethod
    def load_network(self, path: Path) -> nn.Module:
        """The network with the weights in a file; any error means that they do not fit."""

    def make(self, job: FeatureJob) -> FeatureRecord:
        """Fetch the weights. If that fails, the record says why: the network's metrics are marked
        as unavailable, and everything else continues."""
        record = FeatureRecord(name=job.name, settings=job.settings.model_dump())
        try:
            path = self.fetch()
        except UserError as error:
            if self.settings.weights is not None and error.code != "download":
                raise  # the user's own file
            logger.warning("%s is unavailable: %s", job.name, error)
            record.unavailable, record.reason = NO_WEIGHTS, str(error)
        else:
            record.file, record.sha256 = path.name, self.known_sha256 or sha256_file(path)
        record.write(job.folder / "features.json")
        return record

    def load(self, record: FeatureRecord, folder: Path, dataset: Dataset, device: str) -> None:
        self.unavailable, self.missing = record.unavailable, record.missing
        if self.unavailable is None:
            path = self.fetch()
            with reading_weights(path, self.settings.type):
                network = self.load_network(path)
            # Convolutions are fastest in channels_last on a GPU.
            layout = {"memory_format": torch.channels_last} if is_gpu(device) else {}
            self.network = network.to(device, **layout).eval().requires_grad_(False)

    def mean_and_std(self) -> tuple[Sequence[float], Sequence[float]]:
        """Per channel, of pixels in [0, 1], as in the network's training."""
        config = self.network.pretrained_cfg
        return config["mean"], config["std"]

    @cached_property
    def _mean_and_std(self) -> list[Tensor]:
        """On the device, `(3, 1, 1)` each."""
        return [torch.tensor(v).view(3, 1, 1).to(self.device) for v in self.mean_and_std()]

    def inputs(self, pixels: Tensor) -> Tensor:
        """The network's input, `(B, 3, size, size)` on its device. The resize equals PIL's up to
        about one level of 8 bits."""
        x = bicubic(pixels, self.size, self.device).expand(-1, 3, -1, -1).float() / 255
        mean, std = self._mean_and_std
        return (x - mean) / std

    @abstractmethod
    def outputs(self, x: Tensor) -> dict[str, Tensor]:
        """Outputs of the network for one block of inputs."""

    def launch(self, pixels: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
        size = GPU_BLOCK if is_gpu(self.device) else BLOCK
        blocks = [self.outputs(self.inputs(block)) for block in pixels.split(size)]
        if not isinstance(blocks[0], dict):
            message = f"outputs returned a {type(blocks[0]).__name__}; expected a dict of tensors"
            raise TypeError(message)
        return {key: torch.cat([block[key] for block in blocks]) for key in blocks[0]}


@contextlib.contextmanager
def reading_weights(path: Path, network: str) -> Iterator[None]:
    """Turn any error of reading a file of weights, but a `UserError`, into one line."""
    try:
        yield
    except (UserError, NameError, ImportError):  # these are faults of the code, not of the file
        raise
    except Exception as error:  # a foreign file may fail in any way
        # torch's list of differences comes after a title.
        text = str(error).strip() or repr(error)
        reason = re.sub(r"^Error\(s\).*\n\s*", "", text).splitlines()[0]
        if "TorchScript" in reason:  # torch's own messages recommend to load the file unsafely
            reason = "it is a TorchScript archive; use a file in the format safetensors"
        elif "weights_only" in reason:
            reason = "it holds other objects than tensors"
        message = f"{path} does not hold the weights of {network}: {reason[:200]}"
        raise UserError(message, "weights") from None


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict in a .safetensors file or in a file of torch's format, where it may lie under
    the key `state_dict`. The prefix `module.`, of training on several GPUs, is removed."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        weights = load_file(path)
    else:
        weights = load_pickled(path)
        weights = weights.get("state_dict", weights)
    if weights and all(name.startswith("module.") for name in weights):
        weights = {name.removeprefix("module."): tensor for name, tensor in weights.items()}
    return weights


def load_in_order(network: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load weights whose names differ from the network's. Their order must be the same, and each
    must agree in shape and in the last part of its name."""
    own = network.state_dict()
    if len(own) != len(weights):
        raise ValueError(f"{len(weights)} tensors for a network with {len(own)}")
    for (name, tensor), (other, value) in zip(own.items(), weights.items(), strict=True):
        if tensor.shape != value.shape or name.split(".")[-1] != other.split(".")[-1]:
            expected = f"{name} {tuple(tensor.shape)}"
            raise ValueError(f"{other} {tuple(value.shape)} instead of {expected}")
    network.load_state_dict(dict(zip(own, weights.values(), strict=True)))


def fetch_from_hub(repository: str, file: str, instead: str) -> Path:
    """A file of the Hugging Face hub, through its cache. `instead`: what to do without the hub."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, file))
    except OSError:
        message = f"could not download {file} of {repository} (Hugging Face); {instead}"
        raise UserError(message, "download") from None
