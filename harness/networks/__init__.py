"""Backbones by name, and denoisers as folders.

A folder holds what diffusers' `save_pretrained` writes (`config.json`,
`diffusion_pytorch_model.safetensors`) and `denoiser.json`: the preconditioning around it. Of a
denoiser that takes texts, `null.safetensors` is what the empty prompt is to it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor, nn

from harness.denoiser import Denoiser, EDMDenoiser, OneHotDenoiser, TextDenoiser, UNet2DDenoiser
from harness.errors import UserError, did_you_mean
from harness.io.artifacts import load_tensors, read_json, save_tensors, sha256_file, write_json

WEIGHTS = "diffusion_pytorch_model.safetensors"
NULL = "null.safetensors"
CODEC = "vae"  # the folder of a teacher's decoder
FILES = ("config.json", "denoiser.json", WEIGHTS)


@contextlib.contextmanager
def _without_scipy() -> Iterator[None]:
    """Importing a model imports schedulers, and those scipy.stats where there is one: a fifth of a
    stage's start, for samplers that nothing here uses."""
    from unittest import mock

    from diffusers.utils import import_utils

    with mock.patch.object(import_utils, "_scipy_available", False, create=True):
        yield


def _unet2d():
    with _without_scipy():
        from diffusers.models.unets.unet_2d import UNet2DModel

    return UNet2DModel, UNet2DDenoiser


def _unet2d_condition():
    with _without_scipy():
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    return UNet2DConditionModel, TextDenoiser


def _pixart():
    with _without_scipy():
        from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel

    return PixArtTransformer2DModel, None  # none is trained here


def _song():
    from harness.networks.edm_unet import SongUNet

    return SongUNet, OneHotDenoiser


def _dhariwal():
    from harness.networks.edm_unet import DhariwalUNet

    return DhariwalUNet, OneHotDenoiser


# Backbone class name (as in config.json) -> (backbone class, its denoiser), imported when used.
ARCHITECTURES = {
    "UNet2DModel": _unet2d,
    "SongUNet": _song,
    "DhariwalUNet": _dhariwal,
    "UNet2DConditionModel": _unet2d_condition,
}
IMPORTED = ARCHITECTURES | {"PixArtTransformer2DModel": _pixart}


def _architecture(name: str):
    if name not in IMPORTED:
        raise UserError(f"unknown network {name!r}{did_you_mean(name, IMPORTED)}")
    return IMPORTED[name]()


def build_denoiser(
    network: dict,
    image_shape: tuple[int, int, int],
    num_classes: int,
    sigma_data: float = 0.5,
    epsilon: float = 0.0,
    null: dict[str, Tensor] | None = None,
) -> EDMDenoiser:
    """A fresh denoiser: `network` names the backbone under `type` and holds its arguments. `null`:
    the empty prompt's embeddings, for one that takes texts instead of labels."""
    settings = dict(network)
    backbone_class, denoiser_class = _architecture(settings.pop("type"))
    options = {}
    if denoiser_class is TextDenoiser:
        if null is None:
            raise UserError(f"network of type {network['type']}: takes texts; name a text_encoder")
        settings["cross_attention_dim"] = null["embeddings"].shape[-1]
        num_classes, options = 0, {"null": null}
    given = denoiser_class.backbone_arguments(image_shape, num_classes)
    try:
        backbone = backbone_class(**given, **settings)
        return denoiser_class(backbone, num_classes, sigma_data, epsilon, **options)
    except (TypeError, ValueError) as error:
        raise UserError(f"network of type {network['type']}: {error}") from None


def save_denoiser(denoiser: Denoiser, folder: Path, extra: dict | None = None) -> str:
    """Write a denoiser folder; returns the sha256 of its weights. `extra` joins denoiser.json.
    Adapters become part of the weights."""
    from harness.training.lora import merged

    folder, record = Path(folder), denoiser.precondition | (extra or {})
    merged(denoiser.backbone).save_pretrained(folder, safe_serialization=True)
    if hasattr(denoiser, "null"):
        record["null_sha256"] = save_tensors(folder / NULL, denoiser.null.parts)
    write_json(folder / "denoiser.json", record)
    return sha256_file(folder / WEIGHTS)


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
    options = {}
    if "null_sha256" in record:
        options["null"] = load_tensors(folder / NULL, record["null_sha256"], owner=owner)
    if record.get("preconditioning") == "vp":
        from harness.networks.vp import VP_DENOISERS

        denoiser_class = VP_DENOISERS[config["_class_name"]]
        names = ("schedule", "prediction", "sigma_data")
    else:
        names = ("num_classes", "sigma_data", "epsilon")
    denoiser = denoiser_class(backbone, **{name: record[name] for name in names}, **options)
    return denoiser.eval().to(device)


def parts_sha256(teacher: Path) -> str | None:
    """What beside its network's weights decides the images of an imported pipeline: the hash of all
    its parts; None of other teachers."""
    record = read_json(teacher / "teacher.json")
    return record["imported"]["sha256"] if "codec" in record else None


def load_codec(teacher: Path, device: str = "cpu") -> nn.Module:
    """What makes pixels of a teacher's images, read from its folder: nothing is to be done to those
    of a teacher without a decoder."""
    record = read_json(teacher / "teacher.json").get("codec")
    if record is None:
        return nn.Identity()
    from diffusers import AutoencoderKL

    from harness.networks.vp import Codec

    vae = AutoencoderKL.from_config(read_json(teacher / CODEC / "config.json"))
    weights = load_tensors(
        teacher / CODEC / WEIGHTS, record["sha256"], owner=teacher / "teacher.json"
    )
    vae.load_state_dict(weights)
    return Codec(vae.eval()).to(device)


def denoiser_record(folder: Path) -> dict:
    """What `denoiser.json` says: preconditioning and, for students, `sigma_init`."""
    return read_json(Path(folder) / "denoiser.json")
