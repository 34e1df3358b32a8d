"""Learned embeddings of class labels and texts, for discriminators that compare them with features
(projection, Miyato and Koyama 2018)."""

from collections.abc import Mapping

from torch import Tensor, nn


class TextEmbedding(nn.Linear):
    """A linear map of the mean token embedding of a text, without masked padding."""

    def forward(self, condition: Mapping[str, Tensor]) -> Tensor:
        tokens = condition["embeddings"].to(self.weight)
        mask = condition.get("mask", tokens.new_ones(tokens.shape[:2])).to(tokens)
        mean = (tokens * mask[:, :, None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
        return super().forward(mean)


def condition_embedding(num_classes: int, size: int, text_width: int) -> nn.Module:
    """A learned embedding `(B, size)` of labels int64 `(B,)`, or of texts with token embeddings of
    width `text_width`."""
    return TextEmbedding(text_width, size) if text_width else nn.Embedding(num_classes, size)
