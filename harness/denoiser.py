"""The interface of teachers, students and fake scores: a denoiser D(x; σ, c)."""

import copy
from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from harness.errors import UserError
from harness.schedules import edm_weight, karras_sigma

# Class labels int64 `(B,)`; or batch-first tensors by name (text embeddings and mask); or None.
Condition = Tensor | Mapping[str, Tensor] | None


def map_condition(function: Callable[..., Tensor], *conditions: Condition) -> Condition:
    """Apply a function to each tensor of a condition, or of several of the same structure."""
    if isinstance(conditions[0], Mapping):
        return {name: function(*(c[name] for c in conditions)) for name in conditions[0]}
    return None if conditions[0] is None else function(*conditions)


class Denoiser(nn.Module):
    """D(x; σ, c): the estimate of the clean data, given noised data.

    x: float `(B, C, H, W)`, clean data in the model's space (pixels scaled to [-1, 1], or latents)
    plus sigma times standard normal noise. sigma: float `(B,)`. condition: None means "no label" or
    "empty prompt". Returns float32 of the shape of `x`. `codec` maps the model's space to pixels in
    [-1, 1], differentiably.
    """

    preconditioning: ClassVar[str]  # its name in denoiser.json
    settings: ClassVar[tuple[str, ...]] = ()  # constructor arguments stored in denoiser.json
    sigma_data: float = 0.5
    num_classes: int = 0  # 0: not class-conditional
    text_width: int = 0  # dimension of a token's embedding; 0: no text
    augment_labels: int = 0  # dimension of the keyword argument `augment_labels`; 0: none

    def __init__(self) -> None:
        super().__init__()
        self.codec: nn.Module = nn.Identity()

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """`(C, H, W)` in the model's space; by default from a diffusers model's config."""
        config = self.backbone.config
        return (config.in_channels, config.sample_size, config.sample_size)

    @property
    def precondition(self) -> dict:
        """The constructor arguments other than the backbone and the empty prompt."""
        return {name: getattr(self, name) for name in self.settings}

    def null_condition(self, batch: int) -> Condition:
        """The condition "no label" or "empty prompt" for `batch` samples."""
        raise NotImplementedError

    def level(self, sigma: float) -> float:
        """The nearest noise level that a stock scheduler can start from; here any level."""
        return sigma

    def sigma_at(self, u: Tensor) -> Tensor:
        """Noise levels at fractions `u` in [0, 1] of the time axis that losses draw from."""
        return karras_sigma(u)

    def within(self, sigma: Tensor) -> Tensor:
        """Clip noise levels to the range that the network was trained on."""
        return sigma

    def loss_weight(self, sigma: Tensor) -> Tensor:
        """The weight λ(σ) of the squared denoising error that the network was trained with."""
        return edm_weight(sigma, self.sigma_data)


class GuidedDenoiser(Denoiser):
    """Classifier-free guidance (Ho and Salimans 2022): `D_∅ + s (D_c - D_∅)`, two evaluations in
    one batch. `scale` s follows diffusers: 1 is the plain denoiser."""

    def __init__(self, denoiser: Denoiser, scale: float):
        super().__init__()
        self.denoiser, self.scale = denoiser, scale
        self.sigma_data, self.codec = denoiser.sigma_data, denoiser.codec

    def null_condition(self, batch: int) -> Condition:
        return self.denoiser.null_condition(batch)

    def forward(self, x: Tensor, sigma: Tensor, condition: Condition = None, **extras) -> Tensor:
        null = self.null_condition(len(x))
        if condition is None or null is None:
            return self.denoiser(x, sigma, condition, **extras)
        both = map_condition(lambda *parts: torch.cat(parts), null, condition)
        extras = {name: torch.cat([value, value]) for name, value in extras.items()}
        out = self.denoiser(torch.cat([x, x]), torch.cat([sigma, sigma]), both, **extras)
        unconditional, conditional = out.chunk(2)
        return unconditional + self.scale * (conditional - unconditional)


def guided(denoiser: Denoiser, scale: float) -> Denoiser:
    """Apply classifier-free guidance; the denoiser itself for scale 1."""
    return denoiser if scale == 1 else GuidedDenoiser(denoiser, scale)


class EDMDenoiser(Denoiser):
    """EDM's preconditioning (Karras et al. 2022, table 1) around a backbone, in float32.

    The label `num_classes` means "no label". epsilon: 0 for EDM. Consistency models (Song et al.
    2023) and GDD's students replace σ by σ - epsilon in c_skip and in the numerator of c_out.

    A subclass defines `run_backbone(x, c_noise, condition, **extras)` for scaled input and
    `c_noise = ln(σ)/4` `(B,)`, and the static method `backbone_arguments(image_shape, num_classes,
    null)`: constructor arguments of the backbone that follow from the data and, if the backbone
    reads text, from the embedding `null` of the empty prompt.
    """

    preconditioning = "edm"
    settings = ("num_classes", "sigma_data", "epsilon")

    def __init__(
        self, backbone: nn.Module, num_classes: int, sigma_data: float = 0.5, epsilon: float = 0.0
    ):
        super().__init__()
        self.backbone, self.num_classes = backbone, num_classes
        self.sigma_data, self.epsilon = sigma_data, epsilon

    def null_condition(self, batch: int) -> Tensor | None:
        if not self.num_classes:
            return None
        return torch.full((batch,), self.num_classes, device=self.backbone.device)

    def forward(self, x: Tensor, sigma: Tensor, condition=None, **extras) -> Tensor:
        x, sigma = x.float(), sigma.float().view(-1, 1, 1, 1)
        variance, excess = sigma**2 + self.sigma_data**2, sigma - self.epsilon
        c_skip = self.sigma_data**2 / (excess**2 + self.sigma_data**2)
        c_out, c_in = excess * self.sigma_data / variance.sqrt(), 1 / variance.sqrt()
        c_noise = sigma.flatten().log() / 4
        if condition is None:
            condition = self.null_condition(len(x))
        output = self.run_backbone(c_in * x, c_noise, condition, **extras)
        return c_skip * x + c_out * output.float()


def one_step(student: Denoiser, z: Tensor, condition: Condition, sigma_init: float) -> Tensor:
    """The student's image G(z, c) = D(σ_init z; σ_init, c) for standard normal `z` `(B, C, H, W)`.
    For a variance-preserving student, σ_init is rounded to a level of its scheduler."""
    level = student.level(sigma_init)
    return student(level * z, torch.full((len(z),), level, device=z.device), condition)


def clone_denoiser(denoiser: Denoiser) -> Denoiser:
    """A trainable copy without the codec, to start a student or fake score from its teacher."""
    return copy.deepcopy(denoiser, {id(denoiser.codec): nn.Identity()}).requires_grad_(True)


def set_dropout(denoiser: Denoiser, probability: float) -> None:
    """Set the dropout probability of all modules that have one. Raises `UserError` if there are
    none and the probability is positive."""
    if probability and not has_dropout(denoiser):
        message = f"dropout {probability:g}: the denoiser has no layer with dropout; set "
        raise UserError(message + "generator_dropout and dropout to 0", "no-effect")
    for module in denoiser.modules():
        if isinstance(module, nn.Dropout):
            module.p = probability
        elif isinstance(vars(module).get("dropout"), int | float):
            module.dropout = probability


def has_dropout(denoiser: Denoiser) -> bool:
    """Whether `set_dropout` has an effect."""
    return any(
        isinstance(module, nn.Dropout) or isinstance(vars(module).get("dropout"), int | float)
        for module in denoiser.modules()
    )


def to_model_space(pixels: Tensor) -> Tensor:
    """uint8 pixels -> float32 in [-1, 1], with the same bits on every device."""
    # Divide by a tensor: for a Python number CUDA multiplies by its (rounded) reciprocal.
    return pixels.float() / pixels.new_full((), 127.5, dtype=torch.float32) - 1


def to_pixels(x: Tensor) -> Tensor:
    """float in [-1, 1] -> uint8 by EDM's quantisation, `x * 127.5 + 128` clipped."""
    return (x * 127.5 + 128).clip(0, 255).to(torch.uint8)
