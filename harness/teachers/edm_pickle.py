"""Official EDM pickles (Karras et al. 2022, and what SiD and GDD publish) as denoiser folders.

Nothing in the file is executed. A pickle is a program for a small machine that may call whatever
Python function it names; here the machine knows only the names in `_ALLOWED`, each bound to a
function of ours that builds inert data (`harness.teachers.inert`). Anything else is refused with
its name. Tensor data lies in *inner* pickles, which `load_pickled` reads.
"""

from __future__ import annotations

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
from harness.teachers.inert import Inert, InertFunction, InertValue, Refused, told

# Preconditioning classes and their epsilon (see `EDMDenoiser`).
_PRECONDITIONS = {"EDMPrecond": 0.0, "GDDPrecond": 0.002}
_BACKBONES = ("SongUNet", "DhariwalUNet")
# Arguments of the preconditioning, each with a value of its type; all others are the backbone's.
_OUTER = {"img_resolution": 0, "img_channels": 0, "label_dim": 0, "sigma_data": 0.5}
_UNUSED = ("use_fp16", "sigma_min", "sigma_max")
_LARGEST = 4096  # of a whole number among them; official ones end at 1000, ImageNet's labels


class _Record(Inert):
    """A pickled network object: its class's name and its `__dict__`. Its source text is dropped."""

    def __init__(self, meta: dict):
        if type(meta) is not dict or meta.get("type") != "class":
            raise Refused("a persistent object that is no class instance")
        self.class_name, self.state = meta["class_name"], meta["state"]


class _ModuleDict:
    def __setstate__(self, state: dict) -> None:
        self.state = state


class _Dict(dict):
    """The items of a dict; what else it may know of itself is dropped."""

    def __setstate__(self, state) -> None:
        pass


class _DType:
    def __init__(self, code: str, *_):
        if code not in ("f4", "f8", "i4", "i8", "b1"):
            raise Refused(f"numpy dtype {code!r}")
        self.code = code

    def __setstate__(self, state: tuple) -> None:
        if state[1] not in ("<", "|"):
            raise Refused(f"numpy byte order {state[1]!r}")


def _scalar(dtype: _DType, data: bytes):
    import numpy

    if type(dtype) is not _DType:
        raise Refused("a numpy scalar of unknown dtype")
    return numpy.frombuffer(data, "<" + dtype.code, count=1)[0].item()


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise Refused(f"text encoding {encoding!r}")
    return text.encode("latin1")


def _storage(data: bytes) -> InertValue:
    """An inner file: one storage in torch's legacy format, as a flat tensor."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # typed storages are deprecated
        try:
            storage = load_pickled(io.BytesIO(data))
        except pickle.UnpicklingError as error:
            raise Refused(f"tensor data that cannot be read: {error}") from None
        if (
            not isinstance(storage, torch.storage.TypedStorage)
            or not storage.dtype.is_floating_point
        ):
            raise Refused("tensor data that is no storage of floating-point numbers")
        return InertValue(torch.tensor([], dtype=storage.dtype).set_(storage))


def _tensor(storage: InertValue, offset: int, size: tuple, stride: tuple, *_) -> InertValue:
    numbers = (offset, *size, *stride)
    if type(storage) is not InertValue or any(type(n) is not int or n < 0 for n in numbers):
        raise Refused("a tensor with an impossible shape")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    count = math.prod(size)
    if count > storage.value.numel() or (count and last >= storage.value.numel()):
        raise Refused("a tensor that is larger than its data")
    return InertValue(storage.value.as_strided(size, stride, offset))


def _parameter(tensor: InertValue, *_) -> InertValue:
    return tensor


_ALLOWED = {
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _Record,
    ("torch.nn.modules.container", "ModuleDict"): _ModuleDict,
    ("collections", "OrderedDict"): _Dict,
    ("torch._utils", "_rebuild_parameter"): _parameter,
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
        try:
            found = _ALLOWED[module, name]
        except KeyError:
            raise Refused(f"{module}.{name}, which no official EDM pickle needs") from None
        return found if isinstance(found, type) else InertFunction(found)

    def persistent_load(self, pid):
        raise Refused("a persistent id")


# -- from records to a denoiser -----------------------------------------------------------------


def _children(record: _Record | _ModuleDict) -> dict:
    return dict(record.state.get("_modules", {}))


def _tensors(record, prefix: str) -> dict[str, Tensor]:
    """Names -> tensors of a module and all below it, as its state dict would have them."""
    if not isinstance(record, _Record | _ModuleDict):
        raise Refused(f"{prefix.rstrip('.')} of type {type(record).__name__}")
    tensors = {}
    for kind in ("_parameters", "_buffers"):
        for name, tensor in record.state.get(kind, {}).items():
            if tensor is None:
                continue
            if type(tensor) is not InertValue:
                raise Refused(f"{prefix}{name} of type {type(tensor).__name__}")
            tensors[prefix + name] = tensor.value
    for name, child in _children(record).items():
        if child is not None:
            tensors |= _tensors(child, f"{prefix}{name}.")
    return tensors


def _compare(expected: dict, found: dict) -> None:
    """Names and shapes must agree in both directions."""
    for name in expected:
        if name not in found:
            raise Refused(f"no tensor {name}, which its settings ask for")
        if expected[name].shape != found[name].shape:
            raise Refused(
                f"{name} of shape {tuple(found[name].shape)} where its settings ask for "
                f"{tuple(expected[name].shape)}"
            )
    for name in found:
        if name not in expected:
            raise Refused(f"a tensor {name}, which its settings do not ask for")


def _fits(value, like) -> bool:
    """Whether an argument is of the kind of its default `like`: a whole number of a sensible size,
    a list of them, a share of 1, a word."""
    if isinstance(like, tuple):
        return type(value) in (list, tuple) and all(_fits(number, 0) for number in value)
    if isinstance(like, float):
        return type(value) in (int, float) and 0 <= value <= 1
    if isinstance(like, int):
        return type(value) is int and 0 <= value <= _LARGEST
    return type(value) is type(like)


def _settings(network: _Record) -> tuple[str, dict]:
    """The backbone's name, and all arguments of the preconditioning and the backbone together."""
    from harness.networks import ARCHITECTURES

    if network.state.get("_init_args"):
        raise Refused("positional constructor arguments")
    given = {k: v for k, v in network.state["_init_kwargs"].items() if k not in _UNUSED}
    kind = given.pop("model_type", "DhariwalUNet")
    if kind not in _BACKBONES:
        raise Refused(f"a backbone {kind}, but only {' and '.join(_BACKBONES)} can be imported")
    parameters = inspect.signature(ARCHITECTURES[kind]()[0]).parameters.values()
    known = {p.name: p.default for p in parameters if p.default is not p.empty} | _OUTER
    for name, value in given.items():
        if name not in known:
            raise Refused(f"a setting {name}, which {kind} does not have")
        if not _fits(value, known[name]):
            raise Refused(f"{reprlib.repr(value)} as {name}, which no official EDM pickle has")
    return kind, known | given


def _denoiser(network: _Record) -> EDMDenoiser:
    from harness.networks import build_denoiser

    if not isinstance(network, _Record):
        raise Refused(f"'ema' of type {type(network).__name__}, not a network")
    if network.class_name not in _PRECONDITIONS:
        raise Refused(
            f"a {network.class_name}, but only {' and '.join(_PRECONDITIONS)} can be imported"
        )
    kind, settings = _settings(network)
    found = _tensors(_children(network)["model"], "")
    # On the meta device a network takes no memory, only the time of its loops over blocks.
    if len(settings["channel_mult"]) * (settings["num_blocks"] + 1) > len(found):
        raise Refused("fewer tensors than its settings ask for blocks")
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
    _compare(expected, found)
    # Copies: the file's tensors may be of another type, or share their data.
    layout = {"copy": True, "memory_format": torch.contiguous_format}
    weights = {name: found[name].to(tensor.dtype, **layout) for name, tensor in expected.items()}
    denoiser.backbone.load_state_dict(weights, assign=True)
    return denoiser.eval()


def read_edm_pickle(path: Path) -> EDMDenoiser:
    """The network under `ema` of an official pickle. Raises `UserError`, in one line, for anything
    that an official pickle would not hold."""
    path = Path(path)
    try:
        with open(path, "rb") as file:
            content = _Unpickler(file).load()
        if not isinstance(content, dict) or "ema" not in content:
            raise Refused("no entry 'ema'")
        return _denoiser(content["ema"])
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except Refused as error:
        raise UserError(f"{path} is refused: it holds {told(error)}") from None
    except Exception as error:  # a foreign file may fail in any way; none is a crash of ours
        reason = f"{type(error).__name__}: {told(error)}"
        raise UserError(f"{path} is damaged or no EDM pickle ({reason})") from None


def _is_import(path: Path) -> bool:
    """Whether it is what `import_edm` once left there, and nothing more."""
    from harness.networks import FILES, denoiser_record

    if path.is_symlink() or not path.is_dir() or {file.name for file in path.iterdir()} != {*FILES}:
        return False
    return "file" in denoiser_record(path).get("imported", {})  # a run's names its "source"


def import_edm(path: Path, folder: Path) -> dict:
    """Convert an official pickle to a denoiser folder, a new one or in the place of a former
    import; returns what `denoiser.json` says of the source. The licence of the checkpoint stays
    what it is (NVIDIA's: CC BY-NC-SA 4.0)."""
    from harness.networks import save_denoiser

    if os.path.lexists(folder) and not _is_import(Path(folder)):
        raise UserError(f"{folder} exists and is no former import alone; name another")
    denoiser = read_edm_pickle(path)
    source = {"file": Path(path).name, "sha256": sha256_file(path)}
    with atomic_folder(folder) as temporary:
        sha256 = save_denoiser(denoiser, temporary, {"imported": source})
    return source | {"weights": sha256, "parameters": sum(p.numel() for p in denoiser.parameters())}
