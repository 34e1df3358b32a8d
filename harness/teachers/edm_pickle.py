"""Convert official EDM pickles (Karras et al. 2022, SiD, GDD) to denoiser folders, safely.

Nothing in the file is executed: the unpickler rejects all names but those in `_ALLOWED`, each bound
to a function of this module that builds inert data. These objects also reject state: set on a
tensor it would bypass the checks of its bounds, and on a function or class affect the next file.
"""

import inspect
import io
import math
import os
import pickle
import reprlib
import warnings
from pathlib import Path

import torch
from torch import Tensor

from harness.denoiser import EDMDenoiser
from harness.errors import UserError
from harness.io.artifacts import atomic_folder, sha256_file
from harness.io.downloads import load_pickled
from harness.networks import BACKBONES, FILES, build_denoiser, denoiser_record, save_denoiser

# Preconditioning classes and their `EDMDenoiser.epsilon`.
_PRECONDITIONS = {"EDMPrecond": 0.0, "GDDPrecond": 0.002}
_BACKBONES = ("SongUNet", "DhariwalUNet")
# Arguments of the preconditioning, each with a value of its type; the others are the backbone's.
_OUTER = {"img_resolution": 0, "img_channels": 0, "label_dim": 0, "sigma_data": 0.5}
_UNUSED = ("use_fp16", "sigma_min", "sigma_max")
_MAX_INTEGER = 4096  # among the arguments; the largest official one is 1000, ImageNet's classes


class Rejected(pickle.UnpicklingError):
    """The file contains something that an official pickle does not."""


class Inert:
    """An object whose state cannot be set, nor (the method is static) its class's."""

    @staticmethod
    def __setstate__(state) -> None:
        raise Rejected("state for an object that has none")


class InertFunction(Inert):
    def __init__(self, function):
        self.function = function

    def __call__(self, *arguments):
        return self.function(*arguments)


class InertValue(Inert):
    """A tensor, unwrapped when the whole file has been read."""

    def __init__(self, value: Tensor):
        self.value = value


def _printable(error: Exception) -> str:
    """The message of an error, safe for a terminal: names in it come from the file."""
    text = "".join(c if c.isprintable() else " " for c in str(error))
    return " ".join(text.split())[:300]


class _Record(Inert):
    """A pickled network: its class name and its `__dict__`. The source code is dropped."""

    def __init__(self, meta: dict):
        if type(meta) is not dict or meta.get("type") != "class":
            raise Rejected("a persistent object that is not a class instance")
        self.class_name, self.state = meta["class_name"], meta["state"]


class _ModuleDict:
    def __setstate__(self, state: dict) -> None:
        self.state = state


class _Dict(dict):
    """The items of a dict; other state is dropped."""

    def __setstate__(self, state) -> None:
        pass


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


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise Rejected(f"text encoding {encoding!r}")
    return text.encode("latin1")


def _storage(data: bytes) -> InertValue:
    """Read an inner file, one storage in torch's legacy format, as a flat tensor."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # typed storages are deprecated
        try:
            storage = load_pickled(io.BytesIO(data))
        except pickle.UnpicklingError as error:
            raise Rejected(f"unreadable tensor data: {error}") from None
        is_storage = isinstance(storage, torch.storage.TypedStorage)
        if not is_storage or not storage.dtype.is_floating_point:
            raise Rejected("tensor data that is not a storage of floating-point numbers")
        return InertValue(torch.tensor([], dtype=storage.dtype).set_(storage))


def _tensor(storage: InertValue, offset: int, size: tuple, stride: tuple, *_) -> InertValue:
    numbers = (offset, *size, *stride)
    if type(storage) is not InertValue or any(type(n) is not int or n < 0 for n in numbers):
        raise Rejected("a tensor with an impossible shape")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    count = math.prod(size)
    if count > storage.value.numel() or (count and last >= storage.value.numel()):
        raise Rejected("a tensor larger than its data")
    return InertValue(storage.value.as_strided(size, stride, offset))


_ALLOWED = {
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _Record,
    ("torch.nn.modules.container", "ModuleDict"): _ModuleDict,
    ("collections", "OrderedDict"): _Dict,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch.storage", "_load_from_bytes"): _storage,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy._core.multiarray", "scalar"): _scalar,
    ("numpy", "dtype"): _DType,
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,
    ("_codecs", "encode"): _encode,
    ("dnnlib.util", "EasyDict"): _Dict,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        if (module, name) not in _ALLOWED:
            raise Rejected(f"{module}.{name}, which official EDM pickles do not use")
        target = _ALLOWED[module, name]
        return target if isinstance(target, type) else InertFunction(target)

    def persistent_load(self, pid):
        raise Rejected("a persistent id")


def _tensors(record, prefix: str) -> dict[str, Tensor]:
    """The tensors of a module and its children under the names of its state dict."""
    if not isinstance(record, _Record | _ModuleDict):
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
    try:
        with open(path, "rb") as file:
            content = _Unpickler(file).load()
        if not isinstance(content, dict) or "ema" not in content:
            raise Rejected("no entry 'ema'")
        return _denoiser(content["ema"])
    except FileNotFoundError:
        raise UserError(f"{path} does not exist", "missing-file") from None
    except Rejected as error:
        raise UserError(f"{path} rejected: it contains {_printable(error)}", "rejected") from None
    except Exception as error:  # a foreign file may fail in any way
        reason = f"{type(error).__name__}: {_printable(error)}"
        raise UserError(f"{path} is damaged or not an EDM pickle ({reason})", "damaged") from None


def _is_import(path: Path) -> bool:
    """Whether a folder holds exactly what `import_edm` writes."""
    if path.is_symlink() or not path.is_dir() or {file.name for file in path.iterdir()} != {*FILES}:
        return False
    return "file" in denoiser_record(path).get("imported", {})  # a teacher's has "source"


def import_edm(path: Path, folder: Path) -> dict:
    """Convert an official pickle to a denoiser folder, replacing an earlier import in `folder`.

    Returns the file, its sha256, and the hash and number of its weights.
    """
    if os.path.lexists(folder) and not _is_import(Path(folder)):
        message = f"{folder} exists and was not created by import-edm; choose another folder"
        raise UserError(message, "exists")
    denoiser = read_edm_pickle(path)
    source = {"file": Path(path).name, "sha256": sha256_file(path)}
    with atomic_folder(folder) as temporary:
        sha256 = save_denoiser(denoiser, temporary, {"imported": source})
    return source | {"weights": sha256, "parameters": sum(p.numel() for p in denoiser.parameters())}
