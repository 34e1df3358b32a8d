"""Named tensors in numbered safetensors files, with hashes and random access to rows.

Shard n of a folder is `shard-0000n.safetensors`; its record, `shard-0000n.json`, is written after
it. `index.json` is written last and lists all shards. Several processes may write different shards;
an interrupted writer continues at the first incomplete one.
"""

from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.errors import UserError
from harness.io.artifacts import digest, load_tensors, read_json, save_tensors, verify, write_json

INDEX = "index.json"
MAX_HASHED_BYTES = 8 << 30  # `rows` checks the sizes of the files in a larger store, not the hashes


class TensorShards:
    """A store of tensors. `owner`: the folder that errors name for deletion; default `folder`."""

    def __init__(self, folder: Path, owner: Path | None = None):
        self.folder, self.owner = folder, owner or folder
        self._verified: set[int] = set()
        self._mapped: dict[int, dict[str, Tensor]] = {}

    def _path(self, number: int, suffix: str = ".safetensors") -> Path:
        return self.folder / f"shard-{number:05d}{suffix}"

    def has(self, number: int) -> bool:
        """Whether a shard is complete and its file has the recorded sha256."""
        try:
            self._verify(number, read_json(self._path(number, ".json"))["sha256"])
        except (UserError, KeyError, TypeError):
            return False
        return True

    def write(self, number: int, tensors: dict[str, Tensor], **facts: Any) -> None:
        """Write one shard atomically. Its record: `facts`, file, sha256, bytes, rows per tensor."""
        path, record_path = self._path(number), self._path(number, ".json")
        for stale in (self.folder / INDEX, record_path):
            stale.unlink(missing_ok=True)
        vars(self).pop("index", None)
        self._mapped.pop(number, None)
        sha256 = save_tensors(path, tensors)
        rows = {name: len(tensor) for name, tensor in tensors.items()}
        record = {"file": path.name, "sha256": sha256, "bytes": path.stat().st_size, "rows": rows}
        write_json(record_path, record | facts)
        self._verified.add(number)

    def append(self, tensors: dict[str, Tensor], **facts: Any) -> None:
        """Write the next shard."""
        self.write(len(self.records), tensors, **facts)

    def finish(self, **facts: Any) -> dict[str, Any]:
        """Write `index.json` and return it: `facts`, the `shards` and a `sha256` of them all."""
        shards = self.records
        sha256 = digest([shard["sha256"] for shard in shards])
        self.index = facts | {"sha256": sha256, "shards": shards}
        write_json(self.folder / INDEX, self.index)
        return self.index

    @cached_property
    def index(self) -> dict[str, Any]:
        """`index.json` of a finished store."""
        return read_json(self.folder / INDEX, self.owner)

    @property
    def records(self) -> list[dict[str, Any]]:
        """The records of all shards, or of those before the first incomplete one."""
        if (self.folder / INDEX).exists():
            return self.index["shards"]
        records = []
        while self.has(len(records)):
            records.append(read_json(self._path(len(records), ".json")))
        return records

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """The tensors of each shard, verified."""
        for number, record in enumerate(self.records):
            self._verify(number, record["sha256"])
            yield load_tensors(self._path(number), owner=self.owner)

    def load(self) -> dict[str, Tensor]:
        """All tensors, joined along the first dimension. Shards are copied into place one by one:
        memory holds the result and one shard."""
        joined: dict[str, Tensor] = {}
        totals, filled = Counter(), Counter()
        for record in self.records:
            totals.update(record["rows"])
        for tensors in self:
            for name, part in tensors.items():
                if name not in joined:
                    joined[name] = part.new_empty(totals[name], *part.shape[1:])
                joined[name][filled[name] : filled[name] + len(part)] = part
                filled[name] += len(part)
        return joined

    def rows(self, index: Tensor) -> dict[str, Tensor]:
        """Rows `index` (int64 `(B,)`) of all tensors of a finished store, on the host. All tensors
        of a shard must have the same number of rows. Files are mapped into memory."""
        counts = [next(iter(shard["rows"].values())) for shard in self.index["shards"]]
        ends, index = torch.tensor(counts).cumsum(0), index.cpu()
        if len(index) and not 0 <= index.min() <= index.max() < ends[-1]:
            raise IndexError(f"{self.folder} has {int(ends[-1])} rows")
        shards = torch.bucketize(index, ends, right=True)
        found: dict[str, Tensor] = {}
        for number in shards.unique().tolist() or [0]:
            places = (shards == number).nonzero().flatten()
            local = index[places] - (ends[number] - counts[number])
            for name, part in self._map(number).items():
                if name not in found:
                    found[name] = part.new_empty(len(index), *part.shape[1:])
                found[name][places] = part[local]
        return found

    def _map(self, number: int) -> dict[str, Tensor]:
        if number not in self._mapped:
            shards, path = self.index["shards"], self._path(number)
            large = sum(shard["bytes"] for shard in shards) > MAX_HASHED_BYTES
            if not (large and path.exists() and path.stat().st_size == shards[number]["bytes"]):
                self._verify(number, shards[number]["sha256"])
            self._mapped[number] = load_tensors(path, owner=self.owner)
        return self._mapped[number]

    def _verify(self, number: int, sha256: str) -> None:
        """Check a shard's hash, once per object."""
        if number not in self._verified or not self._path(number).exists():
            verify(self._path(number), sha256, self.owner)
            self._verified.add(number)
