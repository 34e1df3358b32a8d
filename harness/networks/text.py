"""The empty prompt, the null condition of networks that read text."""

from __future__ import annotations

from torch import Tensor, nn


class EmptyPrompt(nn.Module):
    """Embedding of the empty prompt: tensors `(1, ...)` that are not part of the state dict."""

    def __init__(self, tensors: dict[str, Tensor]):
        super().__init__()
        self.names = tuple(tensors)
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.names}

    def forward(self, batch: int) -> dict[str, Tensor]:
        """Expand the embedding to `batch` samples."""
        if not self.names:
            raise ValueError("classifier-free guidance needs the empty prompt (null.safetensors)")
        return {name: part.expand(batch, *part.shape[1:]) for name, part in self.tensors.items()}
