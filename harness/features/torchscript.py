"""Weights out of a TorchScript archive, the form in which OpenAI published CLIP; none of its code
runs.

An archive is a zip file: `data.pkl` describes nested modules, `data/<key>` holds their numbers. Of
the names that a pickle may call for, those of modules become empty classes, a handful of others
inert stand-ins (`harness.teachers.inert`), and everything else is refused.
"""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor

from harness.errors import UserError
from harness.teachers.inert import InertFunction, InertValue, Refused, told

DTYPES = {
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
}


class _Module:
    """Stands for any module of the archive; holds what the archive says of it."""

    def __setstate__(self, state: dict) -> None:
        self.state = state


def _tensor(storage: InertValue, offset: int, size, stride, *_) -> InertValue:
    return InertValue(torch.as_strided(storage.value, tuple(size), tuple(stride), offset).clone())


class _Reader(pickle.Unpickler):
    def __init__(self, archive: zipfile.ZipFile, root: str):
        super().__init__(archive.open(f"{root}/data.pkl"))
        self.archive, self.root = archive, root

    def find_class(self, module: str, name: str):
        if module.startswith("__torch__"):
            return type(name, (_Module,), {})
        if module == "torch" and name in DTYPES:
            return InertValue(DTYPES[name])
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return InertFunction(_tensor)
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch.jit._pickle" and name.startswith("build_"):
            return list  # build_intlist and its like
        raise Refused(f"it asks for {module}.{name}")

    def persistent_load(self, pid) -> InertValue:
        _, dtype, key, _, count = pid
        numbers = bytearray(self.archive.read(f"{self.root}/data/{key}"))
        if not count:
            return InertValue(torch.empty(0, dtype=dtype.value))
        return InertValue(torch.frombuffer(numbers, dtype=dtype.value, count=count))


def is_archive(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_weights(path: Path) -> dict[str, Tensor]:
    """Every tensor of the archive by its dotted name, as in a state dict."""
    weights: dict[str, Tensor] = {}

    def walk(module: _Module, prefix: str) -> None:
        for name, value in vars(module).get("state", {}).items():
            if isinstance(value, InertValue) and isinstance(value.value, Tensor):
                weights[prefix + name] = value.value
            elif isinstance(value, _Module):
                walk(value, f"{prefix}{name}.")

    try:
        with zipfile.ZipFile(path) as archive:
            root = next(n for n in archive.namelist() if n.endswith("/data.pkl"))
            walk(_Reader(archive, root.rsplit("/", 1)[0]).load(), "")
    except Exception as error:  # a foreign file may fail in any way; none is a crash of ours
        raise UserError(f"{path} is no TorchScript archive of weights: {told(error)}") from None
    return weights
