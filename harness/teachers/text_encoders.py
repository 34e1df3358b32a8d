"""The text encoders of diffusers pipelines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class PipelineTextEncoder:
    """The tokenizer and text encoder of a pipeline (a `harness.features.base.TextEncoder`).

    limit: tokens per text. masked: whether the denoiser masks padding. prepare: the pipeline's own
    preparation of a text.
    """

    tokenizer: Callable
    network: nn.Module
    limit: int
    masked: bool
    sha256: str
    prepare: Callable[[str], str] = str

    def to(self, device: str) -> PipelineTextEncoder:
        self.network.to(device)
        return self

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """`embeddings` float `(B, L, D)` and, if masked, `mask` int `(B, L)`, on the host."""
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
        """How many of the texts are longer than `limit`."""
        ids = self.tokenizer([self.prepare(text) for text in texts]).input_ids
        return sum(len(tokens) > self.limit for tokens in ids)
