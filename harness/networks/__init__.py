"""Backbones by name, and denoisers as folders.

A folder holds what diffusers' `save_pretrained` writes (`config.json`,
`diffusion_pytorch_model.safetensors`) and `denoiser.json`: the preconditioning around it.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from harness.artifacts import load_tensors, read_json, sha256_file, write_json
from harness.denoiser import EDMDenoiser, OneHotDenoiser, UNet2DDenoiser
from harness.errors import UserError, did_you_mean

WEIGHTS = "diffusion_pytorch_model.safetensors"
FILES = ("config.json", "denoiser.json", WEIGHTS)


def _unet2d():
    from unittest import mock

    from diffusers.utils import import_utils

    # Importing a model imports schedulers, and those scipy.stats where there is one: a fifth of a
    # stage's start, for a sampler that nothing here uses.
    with mock.patch.object(import_utils, "_scipy_available", False, create=True):
        from diffusers.models.unets.unet_2d import UNet2DModel

    return UNet2DModel, UNet2DDenoiser


def _song():
    from harness.networks.edm import SongUNet

    return SongUNet, OneHotDenoiser


def _dhariwal():
    from harness.networks.edm import DhariwalUNet

    return DhariwalUNet, OneHotDenoiser


# Backbone class name (as in config.json) -> (backbone class, its denoiser), imported when used.
ARCHITECTURES = {"UNet2DModel": _unet2d, "SongUNet": _song, "DhariwalUNet": _dhariwal}


def _architecture(name: str):
    if name not in ARCHITECTURES:
        raise UserError(f"unknown network {name!r}{did_you_mean(name, ARCHITECTURES)}")
    return ARCHITECTURES[name]()


def build_denoiser(
    network: dict,
    image_shape: tuple[int, int, int],
    num_classes: int,
    sigma_data: float = 0.5,
    epsilon: float = 0.0,
) -> EDMDenoiser:
    """A fresh denoiser: `network` names the backbone under `type` and holds its arguments."""
    settings = dict(network)
    backbone_class, denoiser_class = _architecture(settings.pop("type"))
    given = denoiser_class.backbone_arguments(image_shape, num_classes)
    try:
        return denoiser_class(backbone_class(**given, **settings), num_classes, sigma_data, epsilon)
    except (TypeError, ValueError) as error:
        raise UserError(f"network of type {network['type']}: {error}") from None


def save_denoiser(denoiser: EDMDenoiser, folder: Path, extra: dict | None = None) -> str:
    """Write a denoiser folder; returns the sha256 of its weights. `extra` joins denoiser.json."""
    denoiser.backbone.save_pretrained(folder, safe_serialization=True)
    write_json(Path(folder) / "denoiser.json", denoiser.precondition | (extra or {}))
    return sha256_file(Path(folder) / WEIGHTS)


def load_denoiser(
    folder: Path, sha256: str | None = None, device: str = "cpu", owner: Path | None = None
) -> EDMDenoiser:
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
    precondition = {name: record[name] for name in ("num_classes", "sigma_data", "epsilon")}
    denoiser = denoiser_class(backbone, **precondition)
    return denoiser.eval().to(device)


def clone_denoiser(denoiser: EDMDenoiser) -> EDMDenoiser:
    """An independent, trainable copy: a student or fake score begins as its teacher."""
    import copy

    return copy.deepcopy(denoiser).requires_grad_(True)


def set_dropout(denoiser: EDMDenoiser, probability: float) -> None:
    """Element dropout in training mode, everywhere in the backbone that has some."""
    for module in denoiser.modules():
        if isinstance(module, nn.Dropout):
            module.p = probability
        elif isinstance(vars(module).get("dropout"), int | float):
            module.dropout = probability


def denoiser_record(folder: Path) -> dict:
    """What `denoiser.json` says: preconditioning and, for students, `sigma_init`."""
    return read_json(Path(folder) / "denoiser.json")
