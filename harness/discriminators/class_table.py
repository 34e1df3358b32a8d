"""The table of class vectors that GDD's conditional discriminator starts from: a row per ImageNet
class, published by its authors. Nothing in a file is executed."""

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from harness.errors import UserError
from harness.io.artifacts import load_tensors
from harness.io.downloads import fetch, is_address
from harness.io.pickles import TENSORS, InertModule, InertValue, Rejected, reading_pickle

SHAPE = (1000, 320)
# Of the authors' file (GDD, commit e9267e8: in_embeddings/tf_efficientnet_lite0.pkl), and of its
# values: the bytes of the float32 numbers, row by row.
FILE_SHA256 = "c109f9a8a2371b78fbd464adaa51f82a4c0015db131b98ad74d8e63e0edcf2c6"
CLASS_TABLE_SHA256 = "fa3794df2537d4b15950f794b19e19db1962cc0e7077f4b19453b05ee7da28e3"

_ALLOWED = TENSORS | {("torch.nn.modules.sparse", "Embedding"): InertModule}


def table_file(source: str) -> Path:
    """The local path of a table: of a file, or of an address that has the authors' file."""
    return fetch(source, FILE_SHA256 if is_address(source) else None)


def load_class_table(path: Path) -> tuple[Tensor, str]:
    """The table in a file, float32 `(1000, 320)`, and the sha256 of its values, which is
    `CLASS_TABLE_SHA256` for the authors' table. Formats: the authors', a pickled dict whose entry
    `embed` is a torch embedding; safetensors with one tensor. Raises a one-line `UserError`."""
    path = Path(path)
    if path.suffix == ".safetensors":
        tensors = [*load_tensors(path).values()]
        if len(tensors) != 1:
            message = f"{path} has {len(tensors)} tensors; a class table is a file with one"
            raise UserError(message, "class-table")
        table = tensors[0]
    else:
        with reading_pickle(path, _ALLOWED, "a class table") as content:
            table = _embedding(content)
    if tuple(table.shape) != SHAPE or not table.is_floating_point():
        found = f"{str(table.dtype).removeprefix('torch.')} {tuple(table.shape)}"
        message = f"{path}: a class table of {found}, but it must be float32 {SHAPE}"
        raise UserError(message, "class-table")
    # A copy: a tensor of a pickle may view its data in any layout.
    table = table.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    if not table.isfinite().all():
        raise UserError(f"{path}: the class table has non-finite numbers", "class-table")
    return table, hashlib.sha256(table.numpy().tobytes()).hexdigest()


def _embedding(content: object) -> Tensor:
    """The weight of the pickled embedding."""
    if not isinstance(content, dict) or not isinstance(content.get("embed"), InertModule):
        raise Rejected("no embedding 'embed'")
    weight = content["embed"].state["_parameters"]["weight"]
    if type(weight) is not InertValue:
        raise Rejected("an embedding without a weight")
    return weight.value
