"""The one interface to every teacher, student and fake score: a denoiser D(x; σ, c)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from harness.schedules import edm_weight, karras_sigma

# What is asked of a denoiser beside the image: class labels int64 `(B,)`, or batch-first tensors by
# name (a text's embeddings and mask), or nothing.
Condition = Tensor | Mapping[str, Tensor] | None


def map_condition(function: Callable[..., Tensor], *conditions: Condition) -> Condition:
    """`function` of conditions of the same kind, part by part."""
    if isinstance(conditions[0], Mapping):
        return {name: function(*(c[name] for c in conditions)) for name in conditions[0]}
    return None if conditions[0] is None else function(*conditions)


class Denoiser(nn.Module):
    """D(x; σ, c): the estimate of the clean data in noised data.

    Shapes: `x` float `(B, C, H, W)`, clean data scaled to [-1, 1] plus sigma times standard
    normal noise; `sigma` float `(B,)`; `condition` a batch-first tensor (class labels int64
    `(B,)`), or a mapping of batch-first tensors, or None for "no condition". Returns float32 of
    the shape of `x`.

    `codec` maps the model's own space to pixels in [-1, 1], differentiably: the identity here.
    """

    sigma_data: float = 0.5
    num_classes: int = 0  # labels that it takes
    text_width: int = 0  # numbers of a token of the texts that it takes
    augment_labels: int = 0  # numbers that it takes under the keyword `augment_labels`

    def __init__(self) -> None:
        super().__init__()
        self.codec: nn.Module = nn.Identity()

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """`(C, H, W)` of what it denoises."""
        raise NotImplementedError

    @property
    def precondition(self) -> dict:
        """What `denoiser.json` holds: the constructor's arguments beside the backbone."""
        raise NotImplementedError

    def null_condition(self, batch: int) -> Condition:
        """The condition that means "none given", for `batch` samples."""
        raise NotImplementedError

    def level(self, sigma: float) -> float:
        """The noise level nearest to this one at which it can be evaluated by others, too: any, or
        one of a scheduler's."""
        return sigma

    def sigma_at(self, u: Tensor) -> Tensor:
        """Noise levels at fractions `u` of the time axis that losses draw from: of EDM's, rho 7,
        whose 0 and 1 are σ = 0.002 and 80, or of a scheduler's."""
        return karras_sigma(u)

    def within(self, sigma: Tensor) -> Tensor:
        """These noise levels, or the nearest ones that it knows."""
        return sigma

    def loss_weight(self, sigma: Tensor) -> Tensor:
        """λ(σ) of the squared error of denoised data in its training: EDM's, or the one that makes
        it the error of a predicted noise."""
        return edm_weight(sigma, self.sigma_data)

    def forward(self, x: Tensor, sigma: Tensor, condition: Condition = None, **extras) -> Tensor:
        raise NotImplementedError


class GuidedDenoiser(Denoiser):
    """Classifier-free guidance (Ho and Salimans 2022) as a denoiser: `D_∅ + s (D_c - D_∅)`, two
    evaluations in one batch. `scale` s as diffusers has it: 1 is the plain denoiser."""

    def __init__(self, denoiser: Denoiser, scale: float):
        super().__init__()
        self.denoiser, self.scale = denoiser, scale
        self.sigma_data, self.codec = denoiser.sigma_data, denoiser.codec

    def null_condition(self, batch: int) -> Condition:
        return self.denoiser.null_condition(batch)

    def forward(self, x: Tensor, sigma: Tensor, condition: Condition = None, **extras) -> Tensor:
        none = self.null_condition(len(x))
        if condition is None or none is None:
            return self.denoiser(x, sigma, condition, **extras)
        both = map_condition(lambda *parts: torch.cat(parts), none, condition)
        extras = {name: torch.cat([value, value]) for name, value in extras.items()}
        out = self.denoiser(torch.cat([x, x]), torch.cat([sigma, sigma]), both, **extras)
        plain, conditional = out.chunk(2)
        return plain + self.scale * (conditional - plain)


def guided(denoiser: Denoiser, scale: float) -> Denoiser:
    """The denoiser under classifier-free guidance, if there is any."""
    return denoiser if scale == 1 else GuidedDenoiser(denoiser, scale)


class EDMDenoiser(Denoiser):
    """EDM's preconditioning (Karras et al. 2022, table 1) around a backbone.

    The preconditioning runs in float32; the backbone may run in bfloat16 under autocast.
    A subclass says how its backbone is built and takes the noise level and the condition.

    Labels run from 0 to `num_classes - 1`; `num_classes` itself means "no label".

    `epsilon`: 0 for EDM's; consistency models (Song et al. 2023) and GDD's students put
    σ - epsilon in place of σ in c_skip and in the numerator of c_out.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        sigma_data: float = 0.5,
        epsilon: float = 0.0,
    ):
        super().__init__()
        self.backbone, self.num_classes = backbone, num_classes
        self.sigma_data, self.epsilon = sigma_data, epsilon

    @staticmethod
    def backbone_arguments(image_shape: tuple[int, int, int], num_classes: int) -> dict:
        """Constructor arguments of the backbone that follow from the data."""
        raise NotImplementedError

    @property
    def precondition(self) -> dict:
        return {name: getattr(self, name) for name in ("num_classes", "sigma_data", "epsilon")}

    def null_condition(self, batch: int) -> Tensor | None:
        if not self.num_classes:
            return None
        return torch.full((batch,), self.num_classes, device=self.backbone.device)

    def run_backbone(self, x: Tensor, c_noise: Tensor, condition, **extras) -> Tensor:
        """The raw network: scaled input `(B, C, H, W)` and `c_noise = ln(σ)/4` `(B,)`."""
        raise NotImplementedError

    def forward(self, x: Tensor, sigma: Tensor, condition=None, **extras) -> Tensor:
        x, sigma = x.float(), sigma.float().view(-1, 1, 1, 1)
        variance = sigma**2 + self.sigma_data**2
        excess = sigma - self.epsilon
        c_skip = self.sigma_data**2 / (excess**2 + self.sigma_data**2)
        c_out = excess * self.sigma_data / variance.sqrt()
        c_in = 1 / variance.sqrt()
        c_noise = sigma.flatten().log() / 4
        if condition is None:
            condition = self.null_condition(len(x))
        output = self.run_backbone(c_in * x, c_noise, condition, **extras)
        return c_skip * x + c_out * output.float()


class UNet2DDenoiser(EDMDenoiser):
    """A diffusers `UNet2DModel` as a class-conditional denoiser.

    Two things are mapped because `UNet2DModel` would refuse or misread them. A missing label:
    the class table has one row more, and the last means "no label". The noise level: c_noise is
    multiplied by `TIME_SCALE`, which spreads it over the wavelengths (from 2π upwards) of the
    sinusoidal embedding; a Fourier embedding takes a logarithm of its input, which c_noise < 0
    turns into NaN, so only `time_embedding_type: positional` is accepted.
    """

    TIME_SCALE = 100.0

    def __init__(self, backbone: nn.Module, num_classes: int, *args, **kwargs):
        super().__init__(backbone, num_classes, *args, **kwargs)
        if backbone.config.time_embedding_type != "positional":
            raise ValueError(f"{type(self).__name__} needs time_embedding_type 'positional'")
        if num_classes and backbone.config.num_class_embeds != num_classes + 1:
            raise ValueError(f"num_class_embeds must be num_classes + 1 = {num_classes + 1}")

    @staticmethod
    def backbone_arguments(image_shape: tuple[int, int, int], num_classes: int) -> dict:
        channels, height, _ = image_shape
        return {
            "sample_size": height,
            "in_channels": channels,
            "out_channels": channels,
            "num_class_embeds": num_classes + 1 if num_classes else None,
        }

    @property
    def image_shape(self) -> tuple[int, int, int]:
        config = self.backbone.config
        return (config.in_channels, config.sample_size, config.sample_size)

    def run_backbone(self, x: Tensor, c_noise: Tensor, condition, **extras) -> Tensor:
        return self.backbone(x, c_noise * self.TIME_SCALE, class_labels=condition, **extras).sample


class TextDenoiser(UNet2DDenoiser):
    """A diffusers `UNet2DConditionModel` as a text-conditional denoiser without classes.

    `condition`: `embeddings` `(B, L, D)` and, where padding is masked, `mask` `(B, L)`. `null`: the
    same of the empty prompt, batch 1.
    """

    def __init__(self, backbone: nn.Module, *args, null: dict[str, Tensor] | None = None, **kwargs):
        super().__init__(backbone, *args, **kwargs)
        self.null = NullText(null or {})

    @property
    def text_width(self) -> int:
        return self.backbone.config.cross_attention_dim

    def null_condition(self, batch: int) -> Condition:
        return self.null(batch)

    def run_backbone(self, x: Tensor, c_noise: Tensor, condition, **extras) -> Tensor:
        return self.backbone(
            x,
            c_noise * self.TIME_SCALE,
            encoder_hidden_states=condition["embeddings"].to(x),
            encoder_attention_mask=condition.get("mask"),
            **extras,
        ).sample


class NullText(nn.Module):
    """What a text encoder makes of the empty prompt: parts `(1, …)`, kept beside the weights and
    not among them."""

    def __init__(self, parts: dict[str, Tensor]):
        super().__init__()
        self.names = tuple(parts)
        for name, part in parts.items():
            self.register_buffer(name, part, persistent=False)

    @property
    def parts(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.names}

    def forward(self, batch: int) -> dict[str, Tensor]:
        if not self.names:
            raise ValueError("this denoiser was not told what the empty prompt is")
        return {name: part.expand(batch, *part.shape[1:]) for name, part in self.parts.items()}


class OneHotDenoiser(EDMDenoiser):
    """One of EDM's networks (harness.networks), whose labels are one-hot vectors: the missing
    label is the zero vector. `condition` may also hold such vectors, float `(B, num_classes)`."""

    @staticmethod
    def backbone_arguments(image_shape: tuple[int, int, int], num_classes: int) -> dict:
        channels, height, _ = image_shape
        return {
            "img_resolution": height,
            "in_channels": channels,
            "out_channels": channels,
            "label_dim": num_classes,
        }

    @property
    def image_shape(self) -> tuple[int, int, int]:
        config = self.backbone.config
        return (config.in_channels, config.img_resolution, config.img_resolution)

    @property
    def augment_labels(self) -> int:
        return self.backbone.config.augment_dim

    def run_backbone(self, x: Tensor, c_noise: Tensor, condition, **extras) -> Tensor:
        if not self.num_classes:
            condition = None
        elif not condition.is_floating_point():
            condition = one_hot(condition, self.num_classes + 1)[:, :-1].float()
        return self.backbone(x, c_noise, condition, **extras)


def one_step(student: Denoiser, z: Tensor, condition: Condition, sigma_init: float) -> Tensor:
    """G(z, c) = D(σ_init z; σ_init, c): the student's image; `z` standard normal `(B, C, H, W)`.
    Of a student that knows a scheduler's noise levels alone, σ_init is the nearest of these."""
    sigma_init = student.level(sigma_init)
    sigma = torch.full((len(z),), sigma_init, device=z.device)
    return student(sigma_init * z, sigma, condition)


def clone_denoiser(denoiser: Denoiser) -> Denoiser:
    """An independent, trainable copy: a student or fake score begins as its teacher. It has no
    codec, which is its teacher's."""
    import copy

    clone = copy.deepcopy(denoiser, {id(denoiser.codec): nn.Identity()})
    return clone.requires_grad_(True)


def set_dropout(denoiser: Denoiser, probability: float) -> None:
    """Element dropout in training mode, everywhere in the backbone that has some."""
    for module in denoiser.modules():
        if isinstance(module, nn.Dropout):
            module.p = probability
        elif isinstance(vars(module).get("dropout"), int | float):
            module.dropout = probability


def to_model_space(pixels: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1], on the same device; the same bits on every device."""
    # A tensor, since CUDA multiplies by the reciprocal of a plain number, which rounds otherwise.
    return pixels.float() / pixels.new_full((), 127.5, dtype=torch.float32) - 1


def to_pixels(x: Tensor) -> Tensor:
    """float in [-1, 1] -> uint8 by `x * 127.5 + 128`, clipped: EDM's quantisation."""
    return (x * 127.5 + 128).clip(0, 255).to(torch.uint8)
