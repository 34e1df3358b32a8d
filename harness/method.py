"""What a method is: settings, the networks that it trains with the student, and its phases.

A method is one file `methods/<name>.py` with one subclass of `Method`, or such a class in a
plug-in file under `@METHODS.register("<name>")`. It contains no loop and reads no file: the trainer
runs its phases (`harness.training.trainer`).
"""

import importlib
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)
from torch import Tensor, nn

import methods
from harness.context import Context
from harness.denoiser import Denoiser
from harness.errors import UserError
from harness.registry import Registry

FOLDER = Path(methods.__file__).parent


def _setting(origin: str, default, source: str, **limits) -> Any:
    """A setting. `source` says where its default was published, or explains it."""
    return Field(default, description=source, json_schema_extra={"origin": origin}, **limits)


Items = TypeVar("Items", list, tuple)


def _unique(values: Items) -> Items:
    """Raise an error for a list or tuple with equal items."""
    for number, value in enumerate(values):
        if value in values[:number]:
            raise ValueError(f"duplicate {value!r}")
    return values


UNIQUE = AfterValidator(_unique)  # of a field: `Annotated[list[str], UNIQUE]`
Beta = Annotated[float, Field(ge=0, lt=1)]  # of Adam

# Settings with defaults from the paper, from the authors' code, and without published defaults.
paper, code, ours = (partial(_setting, origin) for origin in ("paper", "code", "ours"))


class OptimizerConfig(BaseModel):
    """Adam, or AdamW if `weight_decay` is positive."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    lr: float = Field(gt=0)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    warmup_steps: int = Field(0, ge=0)
    decay_steps: int = Field(0, ge=0, description="cosine decay to 0 over so many updates; 0: none")
    clip: float | None = Field(None, gt=0, description="largest gradient norm")
    nonfinite: Literal["skip", "replace"] = Field(
        "skip", description="skip such steps, or replace NaN by 0 and ±inf by ±1e5 in gradients"
    )

    @model_validator(mode="after")
    def _replaced_gradients_are_not_clipped(self):
        if self.nonfinite == "replace" and self.clip is not None:
            raise ValueError("clip needs nonfinite: skip, because it uses the gradients' norm")
        return self

    def rate(self, update: int) -> float:
        """The learning rate of update 1, 2, …: linear warm-up times cosine decay."""
        rate = self.lr * min(1.0, update / max(self.warmup_steps, 1))
        if self.decay_steps:
            rate *= (1 + math.cos(math.pi * min(1.0, (update - 1) / self.decay_steps))) / 2
        return rate


class MethodConfig(BaseModel):
    """Settings of every method; each method's own class overrides the defaults."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    batch: int = ours(256, "images per iteration", gt=0)
    sigma_init: float = ours(80.0, "noise level at which the student is evaluated", gt=0)
    ema_half_life: int = ours(500_000, "images; 0 evaluates the raw weights", ge=0)
    ema_ramp_up: float = ours(0.05, "half-life is at most this fraction of the images seen", gt=0)
    generator_dropout: float = ours(0.0, "of the student while it learns", ge=0, lt=1)
    labels: Literal["data", "uniform"] = ours(
        "data", "law of the student's labels; uniform without images"
    )

    # Settings with a positive default -> the `TeacherFacts` that they need. If the teacher does not
    # have it, the default is 0, or of dropout the teacher's own (`harness.students.defaults`).
    needs: ClassVar[dict[str, str]] = {
        "augment": "augment_labels",
        "dropout": "dropout",
        "generator_dropout": "dropout",
        "fake_dropout": "null_condition",
    }

    # Of settings that several methods have.
    @field_validator("betas", "generator_betas", check_fields=False)
    @classmethod
    def _betas_of_adam(cls, betas: tuple[float, float] | None) -> tuple[float, float] | None:
        if betas is not None and not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"must be at least 0 and below 1, not {list(betas)}")
        return betas

    @field_validator("backbones", check_fields=False)
    @classmethod
    def _different_backbones(cls, backbones: tuple[str, ...]) -> tuple[str, ...]:
        return _unique(backbones)

    @model_validator(mode="after")
    def _times_are_in_order(self) -> Self:
        t_min, t_max = getattr(self, "t_min", 0.0), getattr(self, "t_max", 1.0)
        if t_min >= t_max:
            raise ValueError(f"t_min {t_min:g} must be below t_max {t_max:g}")
        return self

    def without_effect(self, names: Iterable[str], reason: str) -> list[tuple[str, str, str]]:
        """Problems, as of `Method.check`: settings of `names` that differ from their defaults."""
        fields = type(self).model_fields
        changed = [name for name in names if getattr(self, name) != fields[name].default]
        return [(name, "no-effect", f"has no effect with {reason}") for name in changed]


@dataclass(frozen=True)
class Requirements:
    """What must exist before a student trains."""

    pairs: int = 0  # teacher noise -> image pairs
    pair_steps: int = 18  # sampler steps per pair
    features: str | None = None  # a feature network of the experiment, by name
    backbones: tuple[str, ...] = ()  # pretrained networks of timm
    class_table: str | None = None  # file of GDD's class embeddings
    lpips: bool = False  # pretrained LPIPS-VGG
    real_images: bool = False
    ghost_batch: int = 1  # images that must lie in one micro-batch, because they interact

    @property
    def pixels(self) -> bool:
        """Whether a loss needs the student's images decoded."""
        return self.lpips or self.real_images


@dataclass(frozen=True)
class TeacherFacts:
    """What an experiment file, and the files that it names, tell about a teacher and its data set.
    What is unknown has its default."""

    unconditional: bool = True  # also denoises without a condition, as guidance requires
    classes: bool = False  # its condition is a class
    text: bool = False  # its condition is a text
    null_condition: bool = True  # its network has an input for "no label" or the empty prompt
    augment_labels: bool = True  # its network takes EDM's augmentation labels
    dropout: bool = True  # its network has layers with dropout
    own_dropout: float | None = None  # of an imported network; None: the method's default applies
    network: str = "network"  # its class, for messages


@dataclass(frozen=True)
class Phase:
    """The update of one network, `repeat` times in every `every`-th iteration from number `start`.

    loss: context -> scalar. images: names the batch that `Context.generated` returns; phases with
    one name share it if the student runs in the same mode and precision. modes: of networks while
    the phase runs; by default, the updated network is in training mode and all others are in
    evaluation mode. precision: of networks that do not run in the precision of the run.
    """

    name: str
    network: str
    loss: Callable[[Context], Tensor]
    optimizer: OptimizerConfig
    every: int = 1
    repeat: int = 1
    start: int = 0
    images: str = "shared"
    modes: Mapping[str, Literal["train", "eval"]] = field(default_factory=dict)
    precision: Mapping[str, Literal["fp32", "bf16"]] = field(default_factory=dict)

    def due(self, iteration: int) -> bool:
        """Whether the phase runs in an iteration."""
        return iteration >= self.start and (iteration - self.start) % self.every == 0

    def training(self, network: str) -> bool:
        """Whether a network is in training mode while the phase runs."""
        default = "train" if network == self.network else "eval"
        return self.modes.get(network, default) == "train"

    def batch(self, main: str) -> tuple[str, bool, str | None]:
        """What decides the phase's generated images: their name, and the mode and precision of the
        network that generates them, `main`."""
        return self.images, self.training(main), self.precision.get(main)


class Method:
    """Base class. A subclass sets `Config`, `paper` and `data_free`, and defines `phases`."""

    Config: ClassVar[type[MethodConfig]] = MethodConfig
    paper: ClassVar[str] = ""
    data_free: ClassVar[bool] = True
    deviations: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        config: MethodConfig,
        teacher: Denoiser,
        required: Mapping[str, nn.Module] | None = None,
    ):
        """`required`: networks that `requirements` names: "features" (a network's maps),
        "backbones" (a ModuleList), "class_table" (an Embedding), "lpips"."""
        self.config, self.teacher, self.required = config, teacher, dict(required or {})

    @classmethod
    def requirements(cls, config: MethodConfig) -> Requirements:
        return Requirements()

    @classmethod
    def check(cls, config: MethodConfig, teacher: TeacherFacts) -> list[tuple[str, str, str]]:
        """Settings that do not fit the teacher: (setting, error code, message) of each."""
        return []

    @classmethod
    def deviations_under(cls, config: MethodConfig) -> tuple[str, ...]:
        """Deviations from the paper with these settings."""
        return cls.deviations

    def prepare_student(self, student: Denoiser) -> None:
        """Change the student, a copy of the teacher, in place before training."""

    def networks(self) -> dict[str, nn.Module]:
        """Networks that are trained in addition to the student."""
        return {}

    def frozen_networks(self) -> dict[str, nn.Module]:
        """Networks that losses pass through and that are never updated."""
        return {"teacher": self.teacher}

    def phases(self) -> list[Phase]:
        """Phases in the order in which they run in an iteration."""
        raise NotImplementedError


class MethodRegistry(Registry[type[Method]]):
    """Methods by name: the files in methods/ (imported when looked up) and those of plug-ins.
    Files whose names begin with an underscore are not methods."""

    def __iter__(self) -> Iterator[str]:
        return iter(sorted({*super().__iter__(), *_method_files()}))

    def __getitem__(self, name: str) -> type[Method]:
        if name in _method_files():
            module = importlib.import_module(f"methods.{name}")
            types = [value for value in vars(module).values() if isinstance(value, type)]
            own = [value for value in types if value.__module__ == module.__name__]
            classes = [value for value in own if issubclass(value, Method)]
            if len(classes) != 1:
                message = f"must define exactly one Method class, not {len(classes)}"
                raise UserError(f"{module.__file__} {message}", "method")
            self.register(name)(classes[0])
        return super().__getitem__(name)


METHODS = MethodRegistry("method", base=Method)


def _method_files() -> set[str]:
    return {path.stem for path in FOLDER.glob("[!_.]*.py")}


def method_source(name: str) -> tuple[Path, ...]:
    """The files that define a method: its own, and the files in methods/ that it refers to."""
    files = [Path(sys.modules[METHODS[name].__module__].__file__)]
    for file in files:
        for other in re.findall(r"\bmethods(?:\.| import )(\w+)", file.read_text(encoding="utf-8")):
            path = FOLDER / f"{other}.py"
            if path.is_file() and path not in files:
                files.append(path)
    return tuple(files)
