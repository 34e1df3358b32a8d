"""Generated samples block by block, in a form that scoring can resume."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from harness.io.shards import TensorShards
from harness.networks import load_codec, pipeline_sha256
from harness.sampling import Generator, pixels_of, sample
from harness.teachers.text_embeddings import TextEmbeddings, load_embeddings
from harness.training.distributed import processes

logger = logging.getLogger(__name__)

# uint8 pixels `(B, C, H, W)` with the requested classes or prompts `(B,)`, if there are any.
Blocks = Iterator[tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class SampleSource:
    """A generator with what turns its output into pixels.

    shape: of its noise, `(C, H, W)`. codec: decoder of latents, or the identity. embeddings: of the
    evaluation prompts, if it reads prompts. hashes: of what decides its images besides the network.
    """

    generate: Generator
    shape: tuple[int, int, int]
    codec: nn.Module
    embeddings: TextEmbeddings | None
    hashes: tuple = ()

    @property
    def image_bytes(self) -> int:
        """Bytes of one uint8 image."""
        if isinstance(self.codec, nn.Identity):
            return math.prod(self.shape)
        config = self.codec.vae.config
        scale = 2 ** (len(config.block_out_channels) - 1)
        return config.out_channels * self.shape[1] * self.shape[2] * scale**2


def load_decoding(teacher: Path, device: str) -> tuple[nn.Module, TextEmbeddings | None, tuple]:
    """The last three arguments of `SampleSource`, which a teacher shares with its students."""
    embeddings = load_embeddings(teacher, evaluation=True)
    hashes = pipeline_sha256(teacher), embeddings and embeddings.sha256
    return load_codec(teacher, device), embeddings, hashes


@dataclass
class Checkpoints:
    """When a scoring job saves unfinished work: every `seconds`. A job shorter than that saves
    nothing; once it has saved something, it also saves the end of each stream."""

    seconds: float
    used: bool = False
    _last: float = field(default_factory=time.monotonic)

    def due(self, stream_ended: bool) -> bool:
        overdue = time.monotonic() - self._last >= self.seconds
        return overdue or (stream_ended and self.used)

    def saved(self) -> None:
        self._last, self.used = time.monotonic(), True


@dataclass
class SampleStream:
    """The images of one sampling seed from `start` on, for `harness.evaluation.accumulate`.

    `folder` stores what an interrupted job has computed of the images before `start`.
    """

    source: SampleSource
    seed: int
    count: int
    num_conditions: int
    block: int
    device: str
    folder: Path
    checkpoints: Checkpoints

    def __post_init__(self) -> None:
        self.shards, group = TensorShards(self.folder), processes()
        stored = sum(record["images"] for record in self.shards.records) if group.first else 0
        self.start = int(group.agree(stored))

    def __iter__(self) -> Blocks:
        done, logged = self.start, time.monotonic()
        for pixels, labels in sample(
            pixels_of(self.source.generate, self.source.codec),
            self.count,
            self.source.shape,
            self.num_conditions,
            self.seed,
            self.device,
            self.source.embeddings,
            self.block,
            self.start,
            processes(),
        ):
            yield pixels, labels
            done += len(pixels)
            if time.monotonic() - logged >= 60:
                logged = time.monotonic()
                logger.info("%d of %d samples", done, self.count)
