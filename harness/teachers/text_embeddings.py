"""Prompts and what a teacher's text encoder makes of them.

A prompt set is a plain text file, one prompt a line; a prompt is known by its number. Embeddings
are computed once for each text encoder and prompt set and kept on disk in float16, in shards, so
that a set may be larger than memory and an interrupted stage goes on where it stopped.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from harness.data.prompts import Prompts
from harness.errors import UserError
from harness.io.artifacts import (
    digest,
    load_tensors,
    read_json,
    save_tensors,
    verify,
    write_json,
)

SHARD = 256  # prompts of one file of embeddings
HASHED = 8 << 30  # bytes of all files up to which each is hashed before it is used


@dataclass
class TextEncoder:
    """A pipeline's text encoder with its tokenizer.

    `limit`: tokens of a prompt at most; longer ones are cut. `masked`: whether the denoiser is
    told which tokens are padding. `prepare`: what the pipeline does to a text first.
    """

    tokenizer: Callable
    network: nn.Module
    limit: int
    masked: bool
    sha256: str
    prepare: Callable[[str], str] = str

    def to(self, device: str) -> TextEncoder:
        self.network.to(device)
        return self

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """`embeddings` `(B, L, D)` and, if masked, `mask` int64 `(B, L)`, on the host."""
        tokens = self.tokenizer(
            [self.prepare(text) for text in texts],
            padding="max_length",
            max_length=self.limit,
            truncation=True,
            return_tensors="pt",
        )
        device = next(self.network.parameters()).device
        mask = tokens.attention_mask.to(device) if self.masked else None
        embeddings = self.network(tokens.input_ids.to(device), attention_mask=mask)[0].cpu()
        return {"embeddings": embeddings} | ({"mask": tokens.attention_mask} if self.masked else {})

    def truncated(self, texts: Sequence[str]) -> int:
        """How many of the texts are longer than it reads."""
        ids = self.tokenizer([self.prepare(text) for text in texts]).input_ids
        return sum(len(tokens) > self.limit for tokens in ids)


def embed_prompts(encoder: TextEncoder, prompts: Prompts, root: Path) -> Path:
    """Leave the embeddings of a prompt set, and of the empty prompt, in a folder under `root`;
    returns the folder, whose name says the encoder and the prompts."""
    folder = root / digest([encoder.sha256, encoder.limit, prompts.sha256])
    shards = []
    for start in range(0, len(prompts), SHARD):
        record = folder / f"shard-{start:08d}.json"
        if not _whole(record):
            parts = _compact(encoder.encode(prompts.texts[start : start + SHARD]))
            sha256 = save_tensors(record.with_suffix(".safetensors"), parts)
            write_json(
                record,
                {
                    "file": f"{record.stem}.safetensors",
                    "sha256": sha256,
                    "bytes": record.with_suffix(".safetensors").stat().st_size,
                    "truncated": encoder.truncated(prompts.texts[start : start + SHARD]),
                },
            )
            done = min(start + SHARD, len(prompts))
            print(f"prompts: {done} of {len(prompts)}", file=sys.stderr, flush=True)
        shards.append(read_json(record))
    truncated = sum(shard["truncated"] for shard in shards)
    if truncated:
        print(
            f"warning: {truncated} of {len(prompts)} prompts are longer than the {encoder.limit} "
            "tokens that the text encoder reads; what follows is cut off",
            file=sys.stderr,
        )
    write_json(
        folder / "prompts.json",
        {
            "prompts": len(prompts),
            "prompts_sha256": prompts.sha256,
            "encoder_sha256": encoder.sha256,
            "tokens": encoder.limit,
            "truncated": truncated,
            "sha256": digest([shard["sha256"] for shard in shards]),
            "null_sha256": save_tensors(
                folder / "null.safetensors", _compact(encoder.encode([""]))
            ),
            "shards": shards,
        },
    )
    return folder


def _whole(record: Path) -> bool:
    """Whether a shard is there and is what its record says."""
    try:
        known = read_json(record)
        verify(record.with_name(known["file"]), known["sha256"])
    except UserError:
        return False
    return True


def _compact(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """As kept on disk: float16 embeddings, a mask of bytes."""
    for name, part in parts.items():
        if not part.isfinite().all():
            raise UserError(f"the text encoder's {name} hold NaN or infinity; run it in float32")
    return {
        name: part.half() if part.is_floating_point() else part.to(torch.uint8)
        for name, part in parts.items()
    }


def load_embeddings(teacher: Path, evaluation: bool = False) -> Embeddings | None:
    """What a teacher's folder has of the prompts of training, or of those that samples are scored
    on: None for one that takes none."""
    record = read_json(teacher / "teacher.json")
    text = record.get("text")
    if evaluation:
        text = record.get("evaluation_text", text)
    return Embeddings(teacher / text["folder"], teacher / "teacher.json") if text else None


class Embeddings:
    """The embeddings in a folder that `embed_prompts` left, by the prompts' numbers.

    Files are mapped into memory; each is checked when it is first asked: against its hash or, where
    that would mean to read hundreds of gigabytes, by its size. `owner`: what has to go for damaged
    ones to be made again.
    """

    def __init__(self, folder: Path, owner: Path | None = None):
        self.folder, self.owner = folder, owner or folder
        self.record = read_json(folder / "prompts.json", self.owner)
        self._hashed = sum(shard["bytes"] for shard in self.record["shards"]) <= HASHED
        self._open: dict[int, dict[str, Tensor]] = {}

    def __len__(self) -> int:
        return self.record["prompts"]

    @property
    def null(self) -> dict[str, Tensor]:
        """The same of the empty prompt, batch 1."""
        path = self.folder / "null.safetensors"
        return load_tensors(path, self.record["null_sha256"], owner=self.owner)

    def _shard(self, number: int) -> dict[str, Tensor]:
        if number not in self._open:
            from safetensors import safe_open

            shard = self.record["shards"][number]
            path = self.folder / shard["file"]
            if self._hashed or not path.exists() or path.stat().st_size != shard["bytes"]:
                verify(path, shard["sha256"], owner=self.owner)
            file = safe_open(self.folder / shard["file"], framework="pt")
            self._open[number] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return self._open[number]

    def __call__(self, numbers: Tensor) -> dict[str, Tensor]:
        """`embeddings` float16 `(B, L, D)` and, where there is one, `mask` uint8 `(B, L)`, of
        prompts `numbers` `(B,)`, on the host."""
        rows = [
            {name: part[i % SHARD] for name, part in self._shard(i // SHARD).items()}
            for i in numbers.tolist()
        ]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
