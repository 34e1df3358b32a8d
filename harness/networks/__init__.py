"""Denoisers in folders: what diffusers' `save_pretrained` writes, `denoiser.json` with the
preconditioning and, if the denoiser reads text, the embedding of the empty prompt."""

from pathlib import Path

from torch import nn

from harness.denoiser import Denoiser, EDMDenoiser
from harness.errors import UserError
from harness.io.artifacts import load_tensors, read_json, save_tensors, sha256_file, write_json
from harness.io.records import TeacherRecord
from harness.networks.record import denoiser_record, read_record
from harness.networks.registry import BACKBONES, WEIGHTS
from harness.training.lora import merged

__all__ = ["BACKBONES", "denoiser_record"]

NULL = "null.safetensors"
CODEC = "vae"  # the folder of a teacher's decoder
FILES = ("config.json", "denoiser.json", WEIGHTS)


def build_denoiser(
    network: dict, image_shape, num_classes: int, sigma_data=0.5, epsilon=0.0, null=None
) -> EDMDenoiser:
    """Build a denoiser with new weights and EDM's preconditioning.

    network: the backbone's class name under `type`, and its arguments. null: the embedding of the
    empty prompt (tensors by name), for a backbone that reads text instead of class labels.
    """
    kind, settings = network["type"], {k: v for k, v in network.items() if k != "type"}
    backbone = BACKBONES[kind]
    denoiser_class, options = backbone.denoiser("edm"), {}
    if backbone.reads_text:
        num_classes, options = 0, {"null": null}
    try:
        if backbone.reads_weights:  # a plain module, which has its own preconditioning
            return backbone.denoisers[0](backbone.model_class()(**settings))
        arguments = denoiser_class.backbone_arguments(image_shape, num_classes, null)
        for key, value in arguments.items():
            if key in settings and settings.pop(key) != value:
                raise ValueError(f"{key}: the data requires {value}")
        model = backbone.model_class()(**arguments, **settings)
        return denoiser_class(model, num_classes, sigma_data, epsilon, **options)
    except (TypeError, ValueError, ArithmeticError, LookupError) as error:  # of diffusers' networks
        raise UserError(f"network of type {kind}: {error}", "network") from None


def save_denoiser(denoiser: Denoiser, folder: Path, extra: dict | None = None) -> str:
    """Write a denoiser folder, with LoRA adapters merged into the weights and `extra` added to
    denoiser.json; return the sha256 of the weights."""
    record = {"preconditioning": denoiser.preconditioning, **denoiser.precondition, **(extra or {})}
    merged(denoiser.backbone).save_pretrained(folder, safe_serialization=True)
    if hasattr(denoiser, "null"):
        record["null_sha256"] = save_tensors(folder / NULL, dict(denoiser.null.named_buffers()))
    write_json(folder / "denoiser.json", record)
    return sha256_file(folder / WEIGHTS)


def load_denoiser(folder: Path, sha256: str | None = None, device="cpu", owner=None) -> Denoiser:
    """Load the denoiser of a teacher or student folder, in evaluation mode. Files that are missing,
    damaged, or do not fit are a `UserError`, which says to delete `owner` if one is given."""
    folder = Path(folder)
    record, config, denoiser_class = read_record(folder)
    try:
        model = BACKBONES[config["_class_name"]].model_class().from_config(config)
    except (TypeError, ValueError) as error:
        raise UserError(f"{folder / 'config.json'}: {error}", "network") from None
    weights = load_tensors(folder / WEIGHTS, sha256, owner=owner)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        message = f"{folder / WEIGHTS} does not fit {folder / 'config.json'}: {reason}"
        raise UserError(message, "shape") from None
    options = {name: record[name] for name in denoiser_class.settings}
    if "null_sha256" in record:
        options["null"] = load_tensors(folder / NULL, record["null_sha256"], owner=owner)
    try:
        return denoiser_class(model, **options).eval().to(device)
    except (TypeError, ValueError, RuntimeError) as error:
        message = f"{folder / 'denoiser.json'} does not fit {folder / 'config.json'}: {error}"
        raise UserError(" ".join(message.split()), "shape") from None


def pipeline_sha256(teacher: Path) -> str | None:
    """Hash of all parts of an imported pipeline, which all change the images; None for others."""
    record = TeacherRecord.read(teacher / "teacher.json")
    return record.imported["sha256"] if record.codec else None


def load_codec(teacher: Path, device: str = "cpu") -> nn.Module:
    """Load the decoder in a teacher's folder, or an identity for a teacher in pixel space."""
    path = teacher / "teacher.json"
    codec = TeacherRecord.read(path).codec
    if codec is None:
        return nn.Identity()
    from diffusers import AutoencoderKL

    from harness.networks.vp import Codec

    vae = AutoencoderKL.from_config(read_json(teacher / CODEC / "config.json"))
    vae.load_state_dict(load_tensors(teacher / CODEC / WEIGHTS, codec["sha256"], owner=path))
    return Codec(vae.eval()).to(device)
