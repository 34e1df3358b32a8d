"""What a teacher is imported from, and what its files say before weights are read."""

from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from harness.config import schema
from harness.config.schema import ImportedTeacher
from harness.errors import UserError
from harness.io import hub
from harness.io.artifacts import read_json
from harness.networks import denoiser_record
from harness.networks.record import read_record
from harness.networks.registry import BACKBONES
from harness.networks.vp import schedule_sigmas
from harness.teachers import ddpm
from harness.teachers.ddpm import DDPMFolder
from harness.teachers.edm_pickle import pickled_network
from harness.teachers.folders import INDEX, pipeline_class, require_safetensors
from harness.teachers.pipelines import PARTS, PipelineFolder

# Of a repository: what parts of pipelines consist of, without variants and pickles.
_WEIGHTS = ("diffusion_pytorch_model", "model")
_FILES = (
    *("*.json", "*.txt", "*.model", "README.md", "null.safetensors"),
    *(f"{stem}{part}.safetensors" for stem in _WEIGHTS for part in ("", "-*-of-*")),
)


_PARTS = ("unet", "transformer", *PARTS)


@dataclass(frozen=True)
class Network:
    """A teacher's network: its class, its arguments, its preconditioning ("edm", "vp" or that of a
    plug-in), and the range of noise levels of its schedule, if it has one."""

    type: str
    arguments: dict[str, Any]
    preconditioning: str
    levels: tuple[float, float] | None = None

    @property
    def size(self) -> int | None:
        """Width of the images (or latents), if the arguments have it."""
        size = self.arguments.get("img_resolution", self.arguments.get("sample_size"))
        return size if isinstance(size, int) else None

    @property
    def conditional(self) -> bool | None:
        """Whether the network takes class labels, if the arguments tell."""
        if self.type == "UNet2DModel":
            return bool(self.arguments.get("num_class_embeds"))
        return bool(self.arguments["label_dim"]) if "label_dim" in self.arguments else None


Kind = Literal["text-to-image", "ddpm", "denoiser", "file"]


def kind_of(section: ImportedTeacher) -> Kind | None:
    """What a teacher's source is, by its files; None if it does not exist or was not downloaded."""
    path = section.path
    if path is None or not path.exists():
        return None
    if not path.is_dir():
        return "file"
    if (path / "denoiser.json").is_file():
        return "denoiser"
    if ddpm.is_ddpm(path, index := pipeline_class(path)):
        return "ddpm"
    return "text-to-image" if index is not None else "denoiser"


def open_folder(section: ImportedTeacher) -> PipelineFolder | DDPMFolder:
    """The folder of a teacher that is a pipeline."""
    return (DDPMFolder if kind_of(section) == "ddpm" else PipelineFolder)(section.path)


def reads_text(section: ImportedTeacher, files: bool = False) -> bool:
    """Whether a teacher is a text-to-image pipeline, by its folder or, if that need not be
    complete, by its network. files: what exists must be complete."""
    kind = kind_of(section)
    if kind == "text-to-image" or (files and kind is not None):
        return kind == "text-to-image"
    name = (section.network or {}).get("type")
    return name in BACKBONES and BACKBONES[name].pipeline is not None


def check_files(section: ImportedTeacher, kind: Kind) -> None:
    """Raise a `UserError` if the files of a teacher are incomplete, except for weights of a
    repository, which may not be downloaded yet."""
    path = section.path
    if kind in ("text-to-image", "ddpm"):
        folder = open_folder(section)
        folder.levels()
        if section.revision is None:
            require_safetensors(folder.path(folder.network))
    elif kind == "denoiser":
        if not (path / "denoiser.json").is_file():
            raise _no_denoiser(path)
        read_record(path)


def _no_denoiser(path: Path) -> UserError:
    """The error for a folder that is not a teacher."""
    message = f"{path} is neither a denoiser folder (with denoiser.json) nor a pipeline of"
    message += f" diffusers (with {INDEX})"
    if (path / "config.json").is_file():
        name = read_json(path / "config.json").get("_class_name")
        message = f"{path} has a network, {name}, but does not say how it was trained"
        if (path.parent / INDEX).is_file():
            message += f"; set source to the pipeline's folder, {path.parent}"
        else:
            message += f"; add the {ddpm.SCHEDULER} of its pipeline, or denoiser.json"
            message += " (docs/teachers.md)"
    return UserError(message, "missing-file")


def download_configs(section: ImportedTeacher) -> None:
    """Download the JSON files of a repository, unless its folder is in the cache."""
    if section.revision is not None and section.path is None:
        hub.snapshot(section.source, section.revision, "model", ["*.json"])


def download(section: ImportedTeacher) -> None:
    """Download the files of a repository that are not in the cache."""
    if section.revision is None:
        return
    facts = section.source, section.revision, "model"
    folder = hub.snapshot(*facts, [INDEX, *_FILES])
    index = read_json(folder / INDEX) if (folder / INDEX).is_file() else {}
    # Only the parts that are read: others, such as safety checkers, have gigabytes.
    parts = [part for part in index if part in _PARTS]
    if parts:
        hub.snapshot(*facts, [f"{part}/{name}" for part in parts for name in _FILES])


def network_of(section: schema.TeacherSection) -> Network | None:
    """A teacher's network as its files say; as the key `network` says if they are missing or not
    valid, which other checks report. None if it is unknown."""
    given, text = section.network, False
    if isinstance(section, ImportedTeacher):
        with suppress(UserError, KeyError, TypeError):
            if (found := _read_network(section)) is not None:
                return found
        text = reads_text(section)
    if given is None or (name := str(given.get("type"))) not in BACKBONES:
        return None
    arguments = {key: value for key, value in given.items() if key != "type"}
    known = [denoiser.preconditioning for denoiser in BACKBONES[name].denoisers]
    preconditioning = "edm" if "edm" in known and not text else "vp" if text else known[0]
    return Network(name, arguments, preconditioning)


def _read_network(section: ImportedTeacher) -> Network | None:
    path, kind, levels = section.path, kind_of(section), None
    if kind is None or (kind == "file" and is_module(section)):
        return None
    if kind == "file":
        facts = path.stat()
        config = _pickled_network(path, facts.st_mtime_ns, facts.st_size)
        return Network(config["type"], _arguments(config), "edm")
    if kind == "denoiser":
        record, config = denoiser_record(path), read_json(path / "config.json")
        name, preconditioning = config["_class_name"], record["preconditioning"]
        if "schedule" in record:
            sigmas = schedule_sigmas(record["schedule"])
            levels = sigmas[0].item(), sigmas[-1].item()
        return Network(name, _arguments(config), preconditioning, levels)
    folder = open_folder(section)
    config = folder.network_config()
    return Network(config["type"], _arguments(config), "vp", folder.levels())


@lru_cache
def _pickled_network(path: Path, mtime: int, size: int) -> dict[str, Any]:
    return pickled_network(path)


def _arguments(config: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in config.items() if k != "type" and not k.startswith("_")}


def is_module(section: ImportedTeacher) -> bool:
    """Whether a file has the weights of a plain module, which `network` names."""
    name = (section.network or {}).get("type")
    return name in BACKBONES and BACKBONES[name].reads_weights
