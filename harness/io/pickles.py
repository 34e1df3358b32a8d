"""Read foreign pickles of tensors. Nothing in the file is executed: the unpickler rejects all names
but the given ones, each bound to a function or class that builds inert data. These objects also
reject state: set on a tensor it would bypass the checks of its bounds, and on a function or class
affect the next file.
"""

import contextlib
import io
import math
import os
import pickle
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from harness.errors import UserError
from harness.io.downloads import load_pickled


class Rejected(pickle.UnpicklingError):
    """The file contains something unexpected; the message completes "it contains"."""


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


class InertModule:
    """The `__dict__` of a pickled torch module."""

    def __setstate__(self, state: dict) -> None:
        self.state = state


class InertDict(dict):
    """The items of a dict; other state is dropped."""

    def __setstate__(self, state) -> None:
        pass


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


# Tensors, parameters and containers.
TENSORS = {
    ("collections", "OrderedDict"): InertDict,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch.storage", "_load_from_bytes"): _storage,
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,
    ("_codecs", "encode"): _encode,
}


class _WithoutTensors:
    """A file of which long reads, the data of tensors, return zeros. The frames that the format
    is read in have at most 128 KiB."""

    LONG = 1 << 20

    def __init__(self, file):
        self.file, self.readline = file, file.readline

    def read(self, size: int) -> bytes:
        if size <= self.LONG:
            return self.file.read(size)
        self.file.seek(size, os.SEEK_CUR)
        return bytes(size)  # the system gives memory to these zeros when they are read


class _Unpickler(pickle.Unpickler):
    def __init__(self, file, allowed: Mapping[tuple[str, str], object], expected: str):
        super().__init__(file)
        self.allowed, self.expected = allowed, expected

    def find_class(self, module: str, name: str):
        if (module, name) not in self.allowed:
            raise Rejected(f"{module}.{name}, which {self.expected} does not use")
        target = self.allowed[module, name]
        return target if isinstance(target, type) else InertFunction(target)

    def persistent_load(self, pid):
        raise Rejected("a persistent id")


def _printable(error: Exception) -> str:
    """The message of an error, safe for a terminal: names in it come from the file."""
    text = "".join(c if c.isprintable() else " " for c in str(error))
    return " ".join(text.split())[:300]


@contextlib.contextmanager
def reading_pickle(
    path: Path, allowed: Mapping[tuple[str, str], object], expected: str, skip: bool = False
) -> Iterator[object]:
    """The content of a pickle that may use the names in `allowed`: (module, name) -> class or
    function. All errors in the block, `Rejected` included, become a `UserError` of one line.
    expected: the kind of file, such as "an EDM pickle". skip: replace strings of more than 1 MiB,
    the data of large tensors, by zeros."""
    try:
        with open(path, "rb") as file:
            source = _WithoutTensors(file) if skip else file
            content = _Unpickler(source, allowed, expected).load()
        yield content
    except FileNotFoundError:
        raise UserError(f"{path} does not exist", "missing-file") from None
    except Rejected as error:
        raise UserError(f"{path} rejected: it contains {_printable(error)}", "rejected") from None
    except Exception as error:  # a foreign file may fail in any way
        reason = f"{type(error).__name__}: {_printable(error)}"
        raise UserError(f"{path} is damaged or not {expected} ({reason})", "damaged") from None
