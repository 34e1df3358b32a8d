"""Folders that diffusers wrote, read part by part: weights from safetensors only, and no code."""

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import ClassVar

from torch import nn

from harness.config.jobs import TeacherJob
from harness.errors import UserError, did_you_mean
from harness.io.artifacts import digest, read_json, reject_lfs_pointer, sha256_file
from harness.networks import vp

INDEX = "model_index.json"
WEIGHTS = re.compile(r"(diffusion_pytorch_)?model(-\d+-of-\d+)?\.safetensors")


def pipeline_class(folder: Path) -> str | None:
    """The pipeline's class, `_class_name` in model_index.json; None without this file."""
    path = Path(folder) / INDEX
    if not path.is_file():
        return None
    index = read_json(path)
    return str(index.get("_class_name", "")) if isinstance(index, dict) else ""


def read_object(path: Path) -> dict:
    """The content of a JSON file, which must be an object."""
    if not isinstance(content := read_json(path), dict):
        raise UserError(f"{path}: expected an object", "invalid-value")
    return content


class DiffusersFolder:
    """A folder with a network and its scheduler. A subclass sets `network`, the name of the
    network's part, in `__init__`, and calls `_read_scheduler`."""

    predictions: ClassVar[Sequence[str]] = vp.PREDICTIONS
    network: str

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.kind = pipeline_class(folder)

    def path(self, part: str) -> Path:
        """The folder of a part, such as the network."""
        return self.folder / part

    def files(self, *parts: str) -> list[Path]:
        """The files of these parts; by default, of those that the teacher is made from."""
        raise NotImplementedError

    def _check_files(self) -> None:
        """Raise a `UserError` for links without a target and for pointers of Git LFS."""
        for path in self.files():
            if not path.exists():
                message = f"{path} is a link to {os.readlink(path)}, which does not exist"
                raise UserError(message, "dangling-link")
            reject_lfs_pointer(path)

    def _read_scheduler(self, path: Path, named: Sequence[str] | None) -> None:
        """Set the schedule and the prediction from a scheduler's config. diffusers uses the class
        that model_index.json names; the config may come from another, which must be supported, too.
        `other_scheduler`: that class, if it is not the config's."""
        config = read_object(path)
        if not (named is None or (isinstance(named, list) and len(named) == 2)):
            message = f"expected [library, class] as scheduler, not {named!r}"
            raise UserError(f"{self.folder / INDEX}: {message}", "invalid-value")
        kinds = list(filter(None, (config.get("_class_name"), named and named[1]))) or [None]
        self.other_scheduler = kinds[-1] if kinds[-1] != config.get("_class_name") else None
        try:
            read = [vp.read_scheduler(kind, config, self.predictions) for kind in kinds]
        except ValueError as error:
            raise UserError(f"{path}: {error}", "scheduler") from None
        self.schedule, self.prediction = read[-1]
        self.clips = bool(config.get("clip_sample") or config.get("thresholding"))

    def _scheduler(self) -> Path:
        """The scheduler's folder or file, for messages."""
        return self.folder / "scheduler"

    def levels(self) -> tuple[float, float]:
        """The smallest and the largest noise level of the schedule."""
        try:
            sigmas = vp.schedule_sigmas(self.schedule)
        except (TypeError, ValueError, RuntimeError, IndexError) as error:
            message = f"{self._scheduler()}: {' '.join(str(error).split())}"
            raise UserError(message, "scheduler") from None
        if not (sigmas[0] > 0 and (sigmas.diff() > 0).all()):
            message = "noise levels are not positive and increasing, or not finite"
            raise UserError(f"{self._scheduler()}: {message}", "scheduler")
        return sigmas[0].item(), sigmas[-1].item()

    def check_sampler(self, job: TeacherJob) -> None:
        """Check that the teacher's sampler starts at a level of the schedule."""
        largest, sigma_max = self.levels()[1], job.section.sampler.sigma_max
        if sigma_max > 1.01 * largest:
            message = f"{sigma_max:g} exceeds the pipeline's largest noise level, {largest:.4g}"
            raise UserError(f"teachers.{job.name}.sampler.sigma_max: {message}", "noise-level")

    def config(self, part: str) -> dict:
        """The config of a part, without diffusers' private keys."""
        config = read_object(self.path(part) / "config.json")
        return {key: value for key, value in config.items() if not key.startswith("_")}

    def load(self, model_class, part: str, **options) -> nn.Module:
        """Load a network. Weights that are missing would be random, so they are errors."""
        from safetensors import SafetensorError

        folder, options = self.path(part), {**options, "output_loading_info": True}
        require_safetensors(folder)
        try:
            model, info = model_class.from_pretrained(folder, use_safetensors=True, **options)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise UserError(f"{folder}: {' '.join(str(error).split())}", "damaged") from None
        if missing := sorted(map(str, (*info["missing_keys"], *info["mismatched_keys"]))):
            message = f"{len(missing)} weights of {model_class.__name__} are missing: {missing[0]}"
            raise UserError(f"{folder}: {message}, …; download it again", "damaged")
        return model.eval()

    def sha256(self, *parts: str) -> str:
        """Hash of all files in these parts; by default, of what the teacher is made from: those
        files, and the scheduler's class."""
        facts = [(self.name_of(path), sha256_file(path)) for path in self.files(*parts)]
        if self.other_scheduler and not parts:  # the config's own class is in its file
            facts.append((INDEX, self.other_scheduler))
        return digest(facts)

    def name_of(self, path: Path) -> str:
        """The name under which a file's hash counts."""
        return str(path.relative_to(self.folder))


def require_safetensors(folder: Path) -> None:
    """Raise a `UserError` for a network's folder that has no weights as safetensors, or only those
    of a variant."""
    files = sorted(path.name for path in folder.iterdir())
    if any(WEIGHTS.fullmatch(name) for name in files):
        return
    if variants := [name for name in files if name.endswith(".safetensors")]:
        stem = variants[0].split(".")[0]
        message = f"has {variants[0]}, but no {stem}.safetensors; use the one without a variant"
        raise UserError(f"{folder} {message}", "weights")
    pickles = [name for name in files if name.endswith((".bin", ".ckpt", ".pt"))]
    message = f"has its weights as {pickles[0]}, a pickle" if pickles else "has no weights"
    remedy = "only safetensors are read. To convert a pipeline that you trust, load it with"
    remedy += " diffusers and call its save_pretrained(FOLDER, safe_serialization=True)"
    raise UserError(f"{folder} {message}; {remedy}", "weights")


def unknown_pipeline(folder: Path, kind: str, known: Iterable[str]) -> UserError:
    """The error for a pipeline of a class that cannot be a teacher."""
    hint = did_you_mean(kind, known)
    return UserError(f"{folder}: unknown pipeline {kind!r}{hint}", "unknown-name")
