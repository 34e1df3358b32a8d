"""What a method is: settings, the networks it trains beside the student, and its phases.

A method is one file `methods/<name>.py` with one subclass of `Method`. It owns no loop, reads no
file and knows no workflow; `harness.training.trainer` runs its phases.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from harness.context import Context
from harness.denoiser import Denoiser
from harness.errors import UserError, did_you_mean
from harness.io.artifacts import settings_but


def paper(default, source: str, **limits) -> Any:
    """A setting whose default was read in the paper; `source` says where."""
    return Field(default, description=source, json_schema_extra={"origin": "paper"}, **limits)


def code(default, source: str, **limits) -> Any:
    """A setting whose default was read in the authors' code."""
    return Field(default, description=source, json_schema_extra={"origin": "code"}, **limits)


def ours(default, reason: str, **limits) -> Any:
    """A setting that no source gives; `reason` says why this value."""
    return Field(default, description=reason, json_schema_extra={"origin": "ours"}, **limits)


class OptimizerConfig(BaseModel):
    """Adam, or AdamW where `weight_decay` is above 0."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    lr: float = Field(gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    warmup_steps: int = Field(0, ge=0)
    decay_steps: int = Field(0, ge=0, description="cosine to 0 over so many updates; 0: constant")
    clip: float | None = Field(None, gt=0, description="largest gradient norm")

    def rate(self, update: int) -> float:
        """The learning rate of update 1, 2, …: linear warm-up, times the cosine decay."""
        rate = self.lr * min(1.0, update / max(self.warmup_steps, 1))
        if self.decay_steps:
            rate *= (1 + math.cos(math.pi * min(1.0, (update - 1) / self.decay_steps))) / 2
        return rate


class MethodConfig(BaseModel):
    """Settings that every method has; a method's own class gives the paper's defaults."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    batch: int = ours(256, "images per iteration", gt=0)
    sigma_init: float = ours(80.0, "noise level at which the student is evaluated", gt=0)
    ema_half_life: int = ours(500_000, "images; 0 evaluates the raw weights", ge=0)
    ema_ramp_up: float = ours(0.05, "half-life is at most this fraction of the images seen", gt=0)

    # Settings that came later: finished runs outlive them where they keep their defaults.
    LATER: ClassVar[frozenset[str]] = frozenset()

    def spec(self) -> dict:
        """What of the settings decides a run's weights."""
        return settings_but(self, self.LATER)


@dataclass(frozen=True)
class Requirements:
    """What a student needs made before it trains."""

    pairs: int = 0  # teacher noise -> image pairs
    pair_steps: int = 18  # the sampler's steps for them
    features: str | None = None  # a feature network of the experiment, by name
    backbones: tuple[str, ...] = ()  # pretrained networks of timm, in place of `features`
    lpips: bool = False  # LPIPS-VGG, pretrained
    real_images: bool = False

    @property
    def pixels(self) -> bool:
        """Whether a loss looks at pixels: the student's images must be decoded."""
        return self.lpips or self.real_images


@dataclass(frozen=True)
class Phase:
    """One update of one network.

    network: the network it updates. loss: context -> scalar. It runs `repeat` times in every
    `every`-th iteration. variant: step -> a name for what costs differently at that step.
    """

    name: str
    network: str
    loss: Callable[[Context], Tensor]
    optimizer: OptimizerConfig
    every: int = 1
    repeat: int = 1
    variant: Callable[[int], str] = lambda step: ""


class Method:
    """Base class. A subclass sets `Config`, `paper`, `data_free` and gives `phases`."""

    Config: ClassVar[type[MethodConfig]] = MethodConfig
    paper: ClassVar[str] = ""
    data_free: ClassVar[bool] = True
    deviations: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: MethodConfig, teacher: Denoiser, features: nn.Module | None = None):
        """`features`: what `requirements` asks for, the feature network (its maps), a ModuleList of
        backbones, or LPIPS."""
        self.config, self.teacher = config, teacher

    @classmethod
    def requirements(cls, config: MethodConfig) -> Requirements:
        return Requirements()

    @classmethod
    def deviations_under(cls, config: MethodConfig) -> tuple[str, ...]:
        """What differs from the paper with these settings."""
        return cls.deviations

    def prepare_student(self, student: Denoiser) -> None:
        """Change the copy of the teacher that the student begins as, in place."""

    def networks(self) -> dict[str, nn.Module]:
        """The networks trained beside the student."""
        return {}

    def frozen_networks(self) -> dict[str, nn.Module]:
        """Networks that losses go through and that are never updated."""
        return {"teacher": self.teacher}

    def phases(self) -> list[Phase]:
        """In the order in which they run in an iteration."""
        raise NotImplementedError


def method_names() -> list[str]:
    """The files in methods/."""
    import methods

    return sorted(m.name for m in pkgutil.iter_modules(methods.__path__))


def get_method(name: str) -> type[Method]:
    """The one `Method` class in `methods/<name>.py`."""
    if name not in method_names():
        raise UserError(
            f"unknown method {name!r}{did_you_mean(name, method_names())}", "unknown-name"
        )
    module = importlib.import_module(f"methods.{name}")
    classes = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, Method)
        and value.__module__ == module.__name__
    ]
    if len(classes) != 1:
        raise UserError(
            f"methods/{name}.py must define exactly one Method class, not {len(classes)}"
        )
    return classes[0]
