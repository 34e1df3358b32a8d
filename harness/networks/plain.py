"""Plain modules as teachers: any `nn.Module` with its own preconditioning, from a plug-in file.

A plug-in defines how the module is built and how it denoises; weights come from a file of tensors.
docs/teachers.md has a complete example.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from harness.denoiser import Condition, Denoiser
from harness.errors import UserError
from harness.io.artifacts import load_tensors, save_tensors
from harness.io.downloads import load_pickled
from harness.networks.registry import BACKBONES, WEIGHTS, Backbone


class ModuleDenoiser(Denoiser):
    """A plain module as D(x; σ, c). A subclass sets `image_shape` and `num_classes` and defines
    `build` and `denoise`; `@register_module("Name")` makes it the network of type Name.

    null_label: whether the label `num_classes` means "no label", as guidance requires.
    """

    preconditioning = "own"
    image_shape: tuple[int, int, int]
    null_label: ClassVar[bool] = False

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone

    @staticmethod
    def build(**arguments: Any) -> nn.Module:
        """The module with new weights. arguments: those of `network` in an experiment."""
        raise NotImplementedError

    @staticmethod
    def weights(content: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """The module's state dict in the content of a file; override it for nested files."""
        return content

    def denoise(self, module: nn.Module, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """The estimate of the clean images, of the shape of `x` `(B, C, H, W)`: pixels in [-1, 1]
        plus `sigma` `(B,)` times noise. condition: labels int64 `(B,)`, or None without classes."""
        raise NotImplementedError

    def null_condition(self, batch: int) -> Tensor | None:
        if not self.num_classes:
            return None
        if not self.null_label:
            message = f"{type(self).__name__} has no label for an unconditional score"
            raise UserError(f"{message}; set null_label if it has", "no-null-condition")
        return torch.full((batch,), self.num_classes, device=self.backbone.device)

    def forward(self, x: Tensor, sigma: Tensor, condition: Condition = None) -> Tensor:
        x, sigma = x.float(), sigma.float()
        if condition is None:
            condition = self.null_condition(len(x))
        x0 = self.denoise(self.backbone.module, x, sigma, condition).float()
        if x0.shape != x.shape:
            shapes = f"{tuple(x0.shape)} for images {tuple(x.shape)}"
            raise UserError(f"{type(self).__name__}.denoise returned {shapes}", "shape")
        return x0


class PlainBackbone(nn.Module):
    """A plain module in place of a diffusers model: its config, and saving it."""

    denoiser_class: ClassVar[type[ModuleDenoiser]]

    def __init__(self, **arguments: Any):
        super().__init__()
        self.config, self.module = arguments, self.denoiser_class.build(**arguments)

    @classmethod
    def from_config(cls, config: dict) -> "PlainBackbone":
        return cls(**{key: value for key, value in config.items() if not key.startswith("_")})

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def save_pretrained(self, folder: Path, safe_serialization: bool = True) -> None:
        config = {"_class_name": type(self).__name__, **self.config}
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        # Copies: safetensors does not write tensors that share memory (tied weights).
        save_tensors(folder / WEIGHTS, {k: v.clone() for k, v in self.state_dict().items()})


def register_module(name: str) -> Callable[[type[ModuleDenoiser]], type[ModuleDenoiser]]:
    """Register a `ModuleDenoiser` as the network of type `name`."""

    def decorate(denoiser_class: type[ModuleDenoiser]) -> type[ModuleDenoiser]:
        model = type(name, (PlainBackbone,), {"denoiser_class": denoiser_class})

        class Registered(Backbone):
            denoisers = (denoiser_class,)
            reads_weights = True
            null_label = denoiser_class.null_label or not denoiser_class.num_classes

            @staticmethod
            def model_class() -> type[nn.Module]:
                return model

        BACKBONES.register(name, source=denoiser_class)(Registered)
        return denoiser_class

    return decorate


def read_module(file: Path, network: Mapping[str, Any]) -> ModuleDenoiser:
    """A registered module with the weights in a file: safetensors, or a state dict in torch's
    format. network: its type, and the arguments of `build`."""
    name = network["type"]
    denoiser_class = BACKBONES[name].denoisers[0]
    arguments = {key: value for key, value in network.items() if key != "type"}
    if Path(file).suffix == ".safetensors":
        content = load_tensors(file)
    else:
        try:
            content = load_pickled(file)
        except Exception as error:  # a foreign file may fail in any way
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            message = f"{file} is not a file of tensors in torch's format ({reason})"
            raise UserError(message, "damaged") from None
    try:
        model = BACKBONES[name].model_class()(**arguments)
        model.module.load_state_dict(dict(denoiser_class.weights(content)))
    except Exception as error:  # of the user's code
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        message = f"{name} does not fit the weights in {file}: {reason}"
        raise UserError(message, "network") from None
    return denoiser_class(model).eval()
