"""Named tensors in numbered safetensors files, with hashes and random access to rows.

A store is a folder. Shard n is `shard-0000n.safetensors`; its record, `shard-0000n.json`, is
written after it and holds its sha256, its size, and the rows of each tensor. `index.json` is
written last and lists all shards. An interrupted writer continues at the first incomplete shard.
Several processes may write different shards of one store.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.errors import UserError
from harness.io.artifacts import (
    digest,
    load_tensors,
    read_json,
    save_tensors,
    verify,
    write_json,
)

INDEX = "index.json"
MAX_HASHED_BYTES = 8 << 30  # `rows` checks the sizes of the files in a larger store, not the hashes


class TensorShards:
    """A store of tensors, read or written shard by shard.

    `owner`: the folder that error messages say to delete if a file is damaged; default `folder`.
    """

    def __init__(self, folder: Path, owner: Path | None = None):
        self.folder, self.owner = Path(folder), owner or Path(folder)
        self._reset()

    def _reset(self) -> None:
        """Forget what was read from disk."""
        self._verified: set[int] = set()
        self._mapped: dict[int, dict[str, Tensor]] = {}
        self._index: dict[str, Any] | None = None
        self._ends: Tensor | None = None  # of each shard's rows, from 0

    def _path(self, number: int, suffix: str) -> Path:
        return self.folder / f"shard-{number:05d}{suffix}"

    # -- writing ----------------------------------------------------------------------------------

    def has(self, number: int) -> bool:
        """Whether a shard is complete and its file has the recorded sha256."""
        try:
            self._verify(number, read_json(self._path(number, ".json"))["sha256"])
        except (UserError, KeyError, TypeError):
            return False
        return True

    def write(self, number: int, tensors: dict[str, Tensor], **facts: Any) -> dict[str, Any]:
        """Write one shard atomically and return its record.

        `tensors`: at least one, each with a first dimension (rows). `facts`: JSON values to add to
        the record.
        """
        path, record_path = self._path(number, ".safetensors"), self._path(number, ".json")
        for stale in (self.folder / INDEX, record_path):
            stale.unlink(missing_ok=True)
        self._index = self._ends = None
        self._mapped.pop(number, None)
        sha256 = save_tensors(path, tensors)
        rows = {name: len(tensor) for name, tensor in tensors.items()}
        record = {"file": path.name, "sha256": sha256, "bytes": path.stat().st_size, "rows": rows}
        write_json(record_path, record | facts)
        self._verified.add(number)
        return record | facts

    def append(self, tensors: dict[str, Tensor], **facts: Any) -> dict[str, Any]:
        """Write the next shard."""
        return self.write(len(self), tensors, **facts)

    def finish(self, **facts: Any) -> dict[str, Any]:
        """Write `index.json` and return it: `facts`, the `shards` and a `sha256` of them all."""
        shards = self.records
        sha256 = digest([shard["sha256"] for shard in shards])
        write_json(self.folder / INDEX, facts | {"sha256": sha256, "shards": shards})
        self._index = None
        return self.index

    def clear(self) -> None:
        """Delete all files of the store."""
        (self.folder / INDEX).unlink(missing_ok=True)
        for path in [*self.folder.glob("shard-*.json"), *self.folder.glob("shard-*.safetensors")]:
            path.unlink()
        self._reset()

    # -- reading ----------------------------------------------------------------------------------

    @property
    def index(self) -> dict[str, Any]:
        """`index.json` of a finished store."""
        if self._index is None:
            self._index = read_json(self.folder / INDEX, self.owner)
        return self._index

    @property
    def records(self) -> list[dict[str, Any]]:
        """The shards' records, in order: all of a finished store, otherwise those before the first
        incomplete one."""
        if (self.folder / INDEX).exists():
            return self.index["shards"]
        records = []
        while self.has(len(records)):
            records.append(read_json(self._path(len(records), ".json")))
        return records

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """The tensors of each shard, verified."""
        for number, record in enumerate(self.records):
            self._verify(number, record["sha256"])
            yield load_tensors(self._path(number, ".safetensors"), owner=self.owner)

    def load(self) -> dict[str, Tensor]:
        """All tensors, joined along the first dimension.

        Shards are copied into place one by one: memory holds the result and one shard.
        """
        totals: dict[str, int] = {}
        for record in self.records:
            for name, count in record["rows"].items():
                totals[name] = totals.get(name, 0) + count
        joined: dict[str, Tensor] = {}
        filled = dict.fromkeys(totals, 0)
        for tensors in self:
            for name, part in tensors.items():
                if name not in joined:
                    joined[name] = part.new_empty(totals[name], *part.shape[1:])
                joined[name][filled[name] : filled[name] + len(part)] = part
                filled[name] += len(part)
        return joined

    def rows(self, index: Tensor) -> dict[str, Tensor]:
        """Rows `index` (int64 `(B,)`) of all tensors of a finished store, on the host.

        All tensors of a shard must have the same number of rows. Files are mapped into memory; a
        file is verified at its first use, by its size if the store is larger than
        `MAX_HASHED_BYTES`.
        """
        index = index.cpu()
        if self._ends is None:
            counts = [next(iter(shard["rows"].values())) for shard in self.index["shards"]]
            self._ends = torch.tensor([0, *counts]).cumsum(0)
        starts, ends = self._ends[:-1], self._ends[1:]
        if len(index) and not (index.min() >= 0 and index.max() < ends[-1]):
            raise IndexError(f"{self.folder} has {int(ends[-1])} rows")
        shards = torch.bucketize(index, ends, right=True)
        found: dict[str, Tensor] = {}
        for number in shards.unique().tolist() or [0]:
            places = (shards == number).nonzero().flatten()
            local = index[places] - starts[number]
            for name, part in self._map(number).items():
                if name not in found:
                    found[name] = part.new_empty(len(index), *part.shape[1:])
                found[name][places] = part[local]
        return found

    def _map(self, number: int) -> dict[str, Tensor]:
        if number not in self._mapped:
            from safetensors import safe_open

            shards, path = self.index["shards"], self._path(number, ".safetensors")
            hashed = sum(shard["bytes"] for shard in shards) <= MAX_HASHED_BYTES
            size = path.stat().st_size if path.exists() else None
            if hashed or size != shards[number]["bytes"]:
                self._verify(number, shards[number]["sha256"])
            file = safe_open(path, framework="pt")
            self._mapped[number] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return self._mapped[number]

    def _verify(self, number: int, sha256: str) -> None:
        path = self._path(number, ".safetensors")
        if number in self._verified and path.exists():
            return
        verify(path, sha256, self.owner)
        self._verified.add(number)
