"""`OneStepPipeline`: a class-conditional or unconditional student as a diffusers pipeline."""

import contextlib
from collections.abc import Sequence
from typing import Literal, Optional, get_args

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from harness.denoiser import Denoiser, one_step, to_pixels
from harness.networks.registry import BACKBONES

OutputType = Literal["pil", "np", "pt"]
HALF = (torch.float16, torch.bfloat16)


class OneStepPipeline(DiffusionPipeline):
    """A one-step student: `pipe(class_labels=[3, 7]).images`.

    network: the backbone, a `ModelMixin`. sigma_init: the noise level at which it is evaluated.
    preconditioning, settings: of the denoiser, its name and constructor arguments
    (`Denoiser.precondition`). In half precision (`pipe.to(torch.bfloat16)`, or `torch_dtype` of
    `from_pretrained`) the backbone computes in that dtype; noise, preconditioning and images are
    float32.
    """

    model_cpu_offload_seq = "network"

    def __init__(
        self,
        network: torch.nn.Module,
        sigma_init: float = 80.0,
        preconditioning: str = "edm",
        settings: Optional[dict] = None,  # noqa: UP045 (diffusers 0.36 reads no other union)
    ):
        super().__init__()
        self.register_modules(network=network)
        kind = type(network)
        if kind.__module__.partition(".")[0] != "diffusers":
            # diffusers looks the class up in this library, and imports no other by itself.
            self.register_to_config(network=("harness", kind.__name__))
        self.register_to_config(
            sigma_init=sigma_init, preconditioning=preconditioning, settings=settings or {}
        )

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | Sequence[int] | Tensor | None = None,
        batch_size: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Generate images: one per label, or `batch_size` without labels.

        Args:
            class_labels: one label for all images, or a list or tensor `(B,)` with one for each.
                Required if the student is class-conditional, an error if it is not.
            batch_size: number of images; default: the number of labels, generators or latents,
                which must all agree, or 1.
            generator: of the noise, which is drawn image by image: an image does not depend on how
                many follow. A list has one generator for each image. Default: PyTorch's global one.
            latents: standard normal noise `(B, C, H, W)`, in place of random noise.
            output_type: "pil": a list of PIL images; "np": float32 `(B, H, W, C)` in [0, 1]; "pt":
                float32 `(B, C, H, W)` in [0, 1] on the pipeline's device.
            return_dict: return an `ImagePipelineOutput`; otherwise a tuple.

        Raises a `ValueError` for arguments that do not fit the student or each other.
        """
        if output_type not in get_args(OutputType):
            expected = ", ".join(get_args(OutputType))
            raise ValueError(f"output_type {output_type!r} is not one of {expected}")
        device, dtype = self._execution_device, self.network.dtype
        if device.type == "meta":
            raise ValueError("the pipeline is on the meta device and has no weights; load it again")
        if dtype not in (torch.float32, *HALF):
            raise ValueError(f"{dtype} is not supported; use float32, float16 or bfloat16")
        denoiser = self._denoiser(device)
        labels = _integer_labels(class_labels, denoiser.num_classes)
        count = _count(labels, batch_size, generator, latents)
        if labels is not None:
            labels = labels.expand(count).to(device)
        if latents is None:
            generators = list(generator) if _several(generator) else [generator] * count
            shape = (count, *denoiser.image_shape)
            latents = randn_tensor(shape, None if generator is None else generators, device)
        elif latents.shape[1:] != denoiser.image_shape:
            found, shape = tuple(latents.shape), ("B", *denoiser.image_shape)
            raise ValueError(f"latents have shape {found}; expected ({', '.join(map(str, shape))})")
        half = torch.autocast(device.type, dtype) if dtype in HALF else contextlib.nullcontext()
        with half:
            x = one_step(denoiser, latents.to(device).float(), labels, self.config.sigma_init)
        self.maybe_free_model_hooks()
        images = _convert(x, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _denoiser(self, device: torch.device) -> Denoiser:
        """The network with its preconditioning. The denoiser's own buffers are on `device`; the
        network stays where diffusers put it."""
        backbone = BACKBONES[type(self.network).__name__]
        denoiser_class = backbone.denoiser(self.config.preconditioning)
        denoiser = denoiser_class(self.network, **self.config.settings).eval()
        for name, buffer in list(denoiser.named_buffers(recurse=False)):
            setattr(denoiser, name, buffer.to(device))
        return denoiser


def _integer_labels(labels: int | Sequence[int] | Tensor | None, classes: int) -> Tensor | None:
    """Labels as int64 `(B,)`, or `()` for one label; None for an unconditional student."""
    if labels is None and not classes:
        return None
    if labels is None:
        expected = f"give labels from 0 to {classes - 1}"
        raise ValueError(f"class_labels: the student is class-conditional; {expected}")
    if not classes:
        raise ValueError("class_labels: the student is unconditional; give batch_size instead")
    try:
        integers = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError):
        integers = torch.tensor(float("nan"))
    if integers.is_floating_point() or integers.dtype == torch.bool or integers.ndim > 1:
        raise ValueError(f"class_labels: {labels!r} is not an integer or a list of integers")
    wrong = integers[(integers < 0) | (integers >= classes)]
    if len(wrong):
        raise ValueError(f"class_labels: {int(wrong[0])} is not between 0 and {classes - 1}")
    return integers.long()


def _several(generator: object) -> bool:
    return isinstance(generator, list | tuple)


def _count(
    labels: Tensor | None,
    batch_size: int | None,
    generator: torch.Generator | Sequence[torch.Generator] | None,
    latents: Tensor | None,
) -> int:
    """The number of images, on which all arguments must agree."""
    if batch_size is not None and type(batch_size) is not int:
        raise ValueError(f"batch_size: expected a number of images, not {batch_size!r}")
    given = generator if _several(generator) else () if generator is None else (generator,)
    if not all(isinstance(one, torch.Generator) for one in given):
        raise ValueError(f"generator: expected a torch.Generator or a list, not {generator!r}")
    if not (latents is None or isinstance(latents, Tensor)):
        raise ValueError(f"latents: expected a tensor, not {type(latents).__name__}")
    counts = {
        "batch_size": batch_size,
        "class_labels": None if labels is None or labels.ndim == 0 else len(labels),
        "generator": len(generator) if _several(generator) else None,
        "latents": None if latents is None else len(latents),
    }
    counts = {name: count for name, count in counts.items() if count is not None}
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise ValueError(f"arguments for different numbers of images: {found}")
    count = next(iter(counts.values()), 1)
    if count < 1:
        raise ValueError(f"{next(iter(counts))}: expected at least one image, not {count}")
    return count


def _convert(x: Tensor, output_type: OutputType):
    """Images in [-1, 1], `(B, C, H, W)`, in the requested form. PIL images have the pixels that are
    scored."""
    if output_type == "pil":
        from torchvision.transforms.functional import to_pil_image

        return [to_pil_image(pixels) for pixels in to_pixels(x).cpu()]
    images = (x / 2 + 0.5).clip(0, 1)
    return images if output_type == "pt" else images.permute(0, 2, 3, 1).cpu().numpy()
