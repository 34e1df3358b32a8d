"""Convert official EDM pickles (Karras et al. 2022, SiD, GDD) to denoiser folders. Nothing in the
file is executed (`harness.io.pickles`)."""

import inspect
import os
import reprlib
from pathlib import Path

import torch
from torch import Tensor

from harness.denoiser import EDMDenoiser
from harness.errors import UserError
from harness.io.artifacts import atomic_folder, sha256_file, write_json
from harness.io.pickles import (
    TENSORS,
    Inert,
    InertDict,
    InertModule,
    InertValue,
    Rejected,
    reading_pickle,
)
from harness.networks import BACKBONES, FILES, build_denoiser, denoiser_record, save_denoiser

# Preconditioning classes and their `EDMDenoiser.epsilon`.
_PRECONDITIONS = {"EDMPrecond": 0.0, "GDDPrecond": 0.002}
_BACKBONES = ("SongUNet", "DhariwalUNet")
# Arguments of the preconditioning, each with a value of its type; the others are the backbone's.
_OUTER = {"img_resolution": 0, "img_channels": 0, "label_dim": 0, "sigma_data": 0.5}
_UNUSED = ("use_fp16", "sigma_min", "sigma_max")
_MAX_INTEGER = 4096  # among the arguments; the largest official one is 1000, ImageNet's classes


class _Record(Inert):
    """A pickled network: its class name and its `__dict__`. The source code is dropped."""

    def __init__(self, meta: dict):
        if type(meta) is not dict or meta.get("type") != "class":
            raise Rejected("a persistent object that is not a class instance")
        self.class_name, self.state = meta["class_name"], meta["state"]


class _DType:
    def __init__(self, code: str, *_):
        if code not in ("f4", "f8", "i4", "i8", "b1"):
            raise Rejected(f"numpy dtype {code!r}")
        self.code = code

    def __setstate__(self, state: tuple) -> None:
        if state[1] not in ("<", "|"):
            raise Rejected(f"numpy byte order {state[1]!r}")


def _scalar(dtype: _DType, data: bytes):
    import numpy

    if type(dtype) is not _DType:
        raise Rejected("a numpy scalar of unknown dtype")
    return numpy.frombuffer(data, "<" + dtype.code, count=1)[0].item()


_ALLOWED = TENSORS | {
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _Record,
    ("torch.nn.modules.container", "ModuleDict"): InertModule,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy._core.multiarray", "scalar"): _scalar,
    ("numpy", "dtype"): _DType,
    ("dnnlib.util", "EasyDict"): InertDict,
}


def _tensors(record, prefix: str) -> dict[str, Tensor]:
    """The tensors of a module and its children under the names of its state dict."""
    if not isinstance(record, _Record | InertModule):
        raise Rejected(f"{prefix.rstrip('.')} of type {type(record).__name__}")
    tensors = {}
    named = record.state.get("_parameters", {}) | record.state.get("_buffers", {})
    for name, tensor in named.items():
        if type(tensor) is InertValue:
            tensors[prefix + name] = tensor.value
        elif tensor is not None:
            raise Rejected(f"{prefix}{name} of type {type(tensor).__name__}")
    for name, child in record.state.get("_modules", {}).items():
        if child is not None:
            tensors |= _tensors(child, f"{prefix}{name}.")
    return tensors


def _compare(expected: dict, tensors: dict) -> None:
    """Reject missing tensors, additional tensors and different shapes."""
    for name, tensor in expected.items():
        if name not in tensors:
            raise Rejected(f"no tensor {name}, which its settings require")
        shape, required = tuple(tensors[name].shape), tuple(tensor.shape)
        if shape != required:
            raise Rejected(f"{name} of shape {shape}, but its settings require {required}")
    for name in tensors:
        if name not in expected:
            raise Rejected(f"a tensor {name}, which does not belong to its settings")


def _fits(value, like) -> bool:
    """Whether an argument has the type of its default `like`: an integer of plausible size, a list
    of them, a fraction of 1, or a string."""
    if isinstance(like, tuple):
        return type(value) in (list, tuple) and all(_fits(number, 0) for number in value)
    if isinstance(like, float):
        return type(value) in (int, float) and 0 <= value <= 1
    if isinstance(like, int):
        return type(value) is int and 0 <= value <= _MAX_INTEGER
    return type(value) is type(like)


def _settings(network: _Record) -> tuple[str, dict]:
    """The backbone's class name, and all arguments of the preconditioning and the backbone."""
    if network.state.get("_init_args"):
        raise Rejected("positional constructor arguments")
    given = {k: v for k, v in network.state["_init_kwargs"].items() if k not in _UNUSED}
    kind = given.pop("model_type", "DhariwalUNet")
    if kind not in _BACKBONES:
        raise Rejected(f"a backbone {kind}, but only {' and '.join(_BACKBONES)} can be imported")
    parameters = inspect.signature(BACKBONES[kind].model_class()).parameters.values()
    known = {p.name: p.default for p in parameters if p.default is not p.empty} | _OUTER
    for name, value in given.items():
        if name not in known:
            raise Rejected(f"a setting {name}, which {kind} does not take")
        if not _fits(value, known[name]):
            raise Rejected(f"{reprlib.repr(value)} as {name}, unlike official EDM pickles")
    return kind, known | given


def _denoiser(network: _Record) -> EDMDenoiser:
    if not isinstance(network, _Record):
        raise Rejected(f"'ema' of type {type(network).__name__}, not a network")
    if network.class_name not in _PRECONDITIONS:
        known = " and ".join(_PRECONDITIONS)
        raise Rejected(f"a {network.class_name}, but only {known} can be imported")
    kind, settings = _settings(network)
    tensors = _tensors(network.state["_modules"]["model"], "")
    # A network on the meta device takes no memory, but the time of its loops over blocks.
    if len(settings["channel_mult"]) * (settings["num_blocks"] + 1) > len(tensors):
        raise Rejected("fewer tensors than its settings require blocks")
    outer = {name: settings.pop(name) for name in _OUTER}
    size = outer["img_resolution"]
    with torch.device("meta"):
        denoiser = build_denoiser(
            {"type": kind, **settings},
            (outer["img_channels"], size, size),
            outer["label_dim"],
            outer["sigma_data"],
            _PRECONDITIONS[network.class_name],
        )
    expected = denoiser.backbone.state_dict()
    _compare(expected, tensors)
    # Copy: tensors of the file may have another type, or share their data.
    layout = {"copy": True, "memory_format": torch.contiguous_format}
    weights = {name: tensors[name].to(tensor.dtype, **layout) for name, tensor in expected.items()}
    denoiser.backbone.load_state_dict(weights, assign=True)
    return denoiser.eval()


def read_edm_pickle(path: Path) -> EDMDenoiser:
    """Read the network `ema` of an official pickle. Other files raise a one-line `UserError`."""
    with reading_pickle(path, _ALLOWED, "an EDM pickle") as content:
        if not isinstance(content, dict) or "ema" not in content:
            raise Rejected("no entry 'ema'")
        return _denoiser(content["ema"])


def pickled_network(path: Path) -> dict:
    """The backbone of an official pickle: its class under `type`, and its arguments. The data of
    large tensors are not read, so it takes milliseconds."""
    skipped = {
        ("torch._utils", "_rebuild_tensor_v2"): lambda *_: None,
        ("torch.storage", "_load_from_bytes"): lambda _: None,
    }
    with reading_pickle(path, _ALLOWED | skipped, "an EDM pickle", skip=True) as content:
        if not isinstance(content, dict) or not isinstance(content.get("ema"), _Record):
            raise Rejected("no entry 'ema' with a network")
        kind, settings = _settings(content["ema"])
    return {"type": kind, **{k: v for k, v in settings.items() if k not in _OUTER}}


def _is_import(path: Path) -> bool:
    """Whether a folder holds exactly what `import_edm` writes."""
    if path.is_symlink() or not path.is_dir() or {file.name for file in path.iterdir()} != {*FILES}:
        return False
    return "file" in denoiser_record(path).get("imported", {})  # a teacher's has "source"


def import_edm(path: Path, folder: Path) -> dict:
    """Convert an official pickle to a denoiser folder, replacing an earlier import in `folder`.

    Returns the file, its sha256, the hash of the folder's weights, and their number.
    """
    if os.path.lexists(folder) and not _is_import(Path(folder)):
        message = f"{folder} exists and was not created by import-edm; choose another folder"
        raise UserError(message, "exists")
    denoiser = read_edm_pickle(path)
    source = {"file": Path(path).name, "sha256": sha256_file(path)}
    with atomic_folder(folder) as temporary:
        source["weights"] = save_denoiser(denoiser, temporary)
        record = denoiser_record(temporary) | {"imported": source}
        write_json(temporary / "denoiser.json", record)
    return source | {"parameters": sum(p.numel() for p in denoiser.parameters())}


def imported_file(folder: Path) -> dict[str, str]:
    """What `import_edm` recorded in a folder: the pickle's name (`file`) and `sha256`, and that of
    the folder's weights (`weights`). Other folders are a `UserError` (code "not-imported")."""
    path = folder / "denoiser.json"
    record = denoiser_record(folder).get("imported") if path.is_file() else None
    if not isinstance(record, dict) or not {"file", "sha256", "weights"} <= record.keys():
        message = f"{folder} does not record its pickle and weights; make a folder with:"
        raise UserError(f"{message} python -m harness import-edm FILE.pkl FOLDER", "not-imported")
    return record
