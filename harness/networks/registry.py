"""The registry of backbones: the network classes that a denoiser can wrap."""

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import ClassVar

from torch import nn

from harness.denoiser import Denoiser
from harness.registry import Registry

WEIGHTS = "diffusion_pytorch_model.safetensors"  # of diffusers' `save_pretrained`


@dataclass(frozen=True)
class Pipeline:
    """A diffusers text-to-image pipeline that a backbone belongs to."""

    name: str  # of its class
    folder: str  # the backbone's
    text_encoder: str  # "clip" or "t5"
    tokens: int  # length of its text embeddings
    masked: bool  # whether the backbone masks padding


class Backbone:
    """How the harness uses a backbone class, a diffusers `ModelMixin` with `ConfigMixin`.

    Register a subclass in `BACKBONES` under the backbone's class name: `type` in an experiment,
    `_class_name` in config.json. denoisers: classes that wrap the backbone, one for each
    preconditioning: "edm" if it can be trained here, "vp" if it can be imported with a pipeline.
    dropout: whether the network has layers with dropout (`harness.denoiser.set_dropout`).
    """

    model: ClassVar[str]  # module and name of the class, which is imported when needed
    denoisers: ClassVar[tuple[type[Denoiser], ...]] = ()
    reads_text: ClassVar[bool] = False  # the condition is a text embedding, not a class label
    pipeline: ClassVar[Pipeline | None] = None
    dropout: ClassVar[bool] = False
    reads_weights: ClassVar[bool] = False  # of a plain module, from a file
    null_label: ClassVar[bool] = True  # a label or prompt for the unconditional score

    @staticmethod
    def augment_labels(settings: dict) -> int:
        """The number of augmentation labels that a network with these arguments takes."""
        return 0

    @classmethod
    def model_class(cls) -> type[nn.Module]:
        """Import the backbone class."""
        module, _, name = cls.model.rpartition(".")
        diffusers = module.startswith("diffusers.models.")
        load = _import_diffusers_module if diffusers else importlib.import_module
        return getattr(load(module), name)

    @classmethod
    def denoiser(cls, preconditioning: str) -> type[Denoiser] | None:
        """The denoiser class with a preconditioning, if there is one."""
        return next((c for c in cls.denoisers if c.preconditioning == preconditioning), None)


BACKBONES: Registry[type[Backbone]] = Registry("network", "harness.networks.backbones", Backbone)


def trainable_backbones() -> list[str]:
    """Names of the backbones that can be trained here, with EDM's preconditioning."""
    return [name for name in sorted(BACKBONES) if BACKBONES[name].denoiser("edm")]


def _import_diffusers_module(name: str) -> ModuleType:
    """Import one module of diffusers.models. The packages `unets` and `transformers` import all
    models, 3 of the 10 seconds of a stage's start; empty placeholders replace them here."""
    import diffusers.models as models

    packages = [f"{models.__name__}.{part}" for part in ("unets", "transformers")]
    placeholders = {path: ModuleType(path) for path in packages if path not in sys.modules}
    for package, placeholder in placeholders.items():
        placeholder.__path__ = [str(Path(models.__path__[0]) / package.rpartition(".")[-1])]
    sys.modules.update(placeholders)
    try:
        return importlib.import_module(name)
    finally:
        for package in placeholders:
            sys.modules.pop(package, None)
