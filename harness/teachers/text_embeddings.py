"""Embeddings of prompt sets, computed once for each text encoder and stored in float16."""

import logging
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from harness.data.datasets import Dataset
from harness.data.registry import Prompts
from harness.errors import UserError
from harness.features.base import TextEncoder
from harness.io.artifacts import digest
from harness.io.locks import run_lock
from harness.io.records import TeacherRecord
from harness.io.shards import TensorShards
from harness.precision import full_precision

logger = logging.getLogger(__name__)
SHARD = 256  # prompts per file


class TextEmbeddings(TensorShards):
    """Stored embeddings of a prompt set. A call with numbers of prompts `(B,)`, lines of the file,
    returns `embeddings` float16 `(B, L, D)` and, if masked, `mask` uint8 `(B, L)`, on the host."""

    __call__ = TensorShards.rows

    @property
    def sha256(self) -> str:
        return self.index["sha256"]


def embed_dataset(
    encoder: TextEncoder, dataset: Dataset, root: Path
) -> tuple[dict[str, TextEmbeddings], dict[str, Tensor]]:
    """Embeddings of a data set's prompts, by their field in `teacher.json`, and of the empty
    prompt."""
    texts = {"text": embed_prompts(encoder, dataset.prompts, root)}
    if dataset.evaluation_prompts is not dataset.prompts:
        texts["evaluation_text"] = embed_prompts(encoder, dataset.evaluation_prompts, root)
    return texts, embed(encoder, ("",))


def embed_prompts(encoder: TextEncoder, prompts: Prompts, root: Path) -> TextEmbeddings:
    """Embed a prompt set in a subfolder of `root`, continuing after its complete shards."""
    shards = TextEmbeddings(root / digest([encoder.sha256, encoder.limit, prompts.sha256]))
    with run_lock(shards.folder):  # all processes of a job come here
        for start in tqdm(range(0, len(prompts), SHARD), "prompts", unit="shard", disable=None):
            if not shards.has(start // SHARD):
                texts = prompts.texts[start : start + SHARD]
                truncated = encoder.truncated(texts)
                shards.write(start // SHARD, embed(encoder, texts), truncated=truncated)
        truncated = sum(shard["truncated"] for shard in shards.records)
        shards.finish(prompts=len(prompts), tokens=encoder.limit, truncated=truncated)
    if truncated:
        message = "truncated %d of %d prompts to the %d tokens that the encoder reads"
        logger.warning(message, truncated, len(prompts), encoder.limit)
    return shards


@full_precision()
def embed(encoder: TextEncoder, texts: tuple[str, ...]) -> dict[str, Tensor]:
    """Embeddings of texts as they are stored: float16, and the mask in bytes. Computed in full
    precision, whatever the training of the teacher allows."""
    tensors = encoder.encode(texts)
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            message = f"the text encoder's {name} contain NaN or infinity; run it in float32"
            raise UserError(message, "not-finite")
    types = {True: torch.float16, False: torch.uint8}
    return {name: part.to(types[part.is_floating_point()]) for name, part in tensors.items()}


def load_embeddings(teacher: Path, evaluation: bool = False) -> TextEmbeddings | None:
    """Embeddings of a teacher's training or evaluation prompts; None if it reads no text."""
    path = teacher / "teacher.json"
    record = TeacherRecord.read(path)
    text = (evaluation and record.evaluation_text) or record.text
    return TextEmbeddings(teacher / text.file, path) if text else None
