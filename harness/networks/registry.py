"""The registry of backbones: the network classes that a denoiser can wrap."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import ClassVar

from torch import nn

from harness.denoiser import Denoiser
from harness.registry import Registry


@dataclass(frozen=True)
class Pipeline:
    """A diffusers text-to-image pipeline that a backbone belongs to.

    name: its class. folder: the backbone's folder in it. text_encoder: "clip" or "t5". tokens:
    length of its text embeddings. masked: whether the backbone masks padding.
    """

    name: str
    folder: str
    text_encoder: str
    tokens: int
    masked: bool


class Backbone:
    """How the harness uses a backbone class, a diffusers `ModelMixin` with `ConfigMixin`.

    Register a subclass in `BACKBONES` under the backbone's class name: `type` in an experiment,
    `_class_name` in config.json. denoisers: classes that wrap the backbone, one for each
    preconditioning: "edm" if it can be trained here, "vp" if it can be imported with a pipeline.
    reads_text: its condition is a text embedding, not a class label.
    """

    denoisers: ClassVar[tuple[type[Denoiser], ...]] = ()
    reads_text: ClassVar[bool] = False
    pipeline: ClassVar[Pipeline | None] = None

    @staticmethod
    def model_class() -> type[nn.Module]:
        """Import the backbone class. The registry is read at every start, so heavy imports belong
        here and not at the top of the file."""
        raise NotImplementedError

    @classmethod
    def denoiser(cls, preconditioning: str) -> type[Denoiser] | None:
        """The denoiser class with a preconditioning, if there is one."""
        matches = (c for c in cls.denoisers if c.preconditioning == preconditioning)
        return next(matches, None)


BACKBONES: Registry[type[Backbone]] = Registry("network", "harness.networks.backbones")


def trainable_backbones() -> list[str]:
    """Names of the backbones that can be trained here, with EDM's preconditioning."""
    return [name for name in BACKBONES.names() if BACKBONES[name].denoiser("edm")]


def import_diffusers_model(module: str, name: str) -> type[nn.Module]:
    """Import one model class of diffusers without the other models of its package.

    The packages `unets` and `transformers` of diffusers.models import all their models, which takes
    3 of the 10 seconds of a stage's start. Placeholders without content replace the two packages
    during this import; a later import of the packages themselves works as usual.
    """
    import diffusers.models as models

    packages = [f"{models.__name__}.{part}" for part in ("unets", "transformers")]
    placeholders = {name: ModuleType(name) for name in packages if name not in sys.modules}
    for package, placeholder in placeholders.items():
        placeholder.__path__ = [str(Path(models.__path__[0]) / package.rpartition(".")[-1])]
    sys.modules.update(placeholders)
    try:
        return getattr(importlib.import_module(f"{models.__name__}.{module}"), name)
    finally:
        for package in placeholders:
            sys.modules.pop(package, None)
