"""Backbones by name, and denoisers as folders.

A folder holds what diffusers' `save_pretrained` writes (`config.json`,
`diffusion_pytorch_model.safetensors`) and `denoiser.json`: the preconditioning around it.
"""

from __future__ import annotations

from pathlib import Path

from harness.artifacts import load_tensors, read_json, sha256_file, write_json
from harness.denoiser import Denoiser, UNet2DDenoiser
from harness.errors import UserError, did_you_mean

WEIGHTS = "diffusion_pytorch_model.safetensors"


def _unet2d():
    from diffusers.models.unets.unet_2d import UNet2DModel

    return UNet2DModel, UNet2DDenoiser


# Backbone class name (as in config.json) -> (backbone class, its denoiser), imported when used.
ARCHITECTURES = {"UNet2DModel": _unet2d}


def _architecture(name: str):
    if name not in ARCHITECTURES:
        raise UserError(f"unknown network {name!r}{did_you_mean(name, ARCHITECTURES)}")
    return ARCHITECTURES[name]()


def build_denoiser(
    network: dict, image_shape: tuple[int, int, int], num_classes: int, sigma_data: float
) -> Denoiser:
    """A fresh denoiser: `network` names the backbone under `type` and holds its arguments."""
    settings = dict(network)
    backbone_class, denoiser_class = _architecture(settings.pop("type"))
    channels, height, _ = image_shape
    try:
        backbone = backbone_class(
            sample_size=height,
            in_channels=channels,
            out_channels=channels,
            num_class_embeds=num_classes + 1 if num_classes else None,
            **settings,
        )
        return denoiser_class(backbone, num_classes, sigma_data)
    except (TypeError, ValueError) as error:
        raise UserError(f"network of type {network['type']}: {error}") from None


def save_denoiser(denoiser: Denoiser, folder: Path, extra: dict | None = None) -> str:
    """Write a denoiser folder; returns the sha256 of its weights. `extra` joins denoiser.json."""
    denoiser.backbone.save_pretrained(folder, safe_serialization=True)
    record = {"num_classes": denoiser.num_classes, "sigma_data": denoiser.sigma_data}
    write_json(Path(folder) / "denoiser.json", record | (extra or {}))
    return sha256_file(Path(folder) / WEIGHTS)


def load_denoiser(
    folder: Path, sha256: str | None = None, device: str = "cpu", owner: Path | None = None
) -> Denoiser:
    """The denoiser in a teacher or student folder, in evaluation mode.

    Weights come from safetensors alone. A missing part, a damaged file, weights that do not fit
    the architecture, or (if `sha256` is given) weights of another run raise a `UserError`, which
    names `owner` (the folder, if not given) as what to delete.
    """
    folder = Path(folder)
    record = read_json(folder / "denoiser.json")
    config = read_json(folder / "config.json")
    backbone_class, denoiser_class = _architecture(config["_class_name"])
    backbone = backbone_class.from_config(config)
    weights = load_tensors(folder / WEIGHTS, sha256, owner=owner)
    try:
        backbone.load_state_dict(weights)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise UserError(
            f"{folder / WEIGHTS} does not fit {folder / 'config.json'}: {reason}"
        ) from None
    denoiser = denoiser_class(backbone, record["num_classes"], record["sigma_data"])
    return denoiser.eval().to(device)


def clone_denoiser(denoiser: Denoiser) -> Denoiser:
    """An independent, trainable copy: a student or fake score begins as its teacher."""
    import copy

    return copy.deepcopy(denoiser).requires_grad_(True)


def denoiser_record(folder: Path) -> dict:
    """What `denoiser.json` says: preconditioning and, for students, `sigma_init`."""
    return read_json(Path(folder) / "denoiser.json")
