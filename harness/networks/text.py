"""The null condition of networks that read text."""

from torch import Tensor, nn


class EmptyPrompt(nn.Module):
    """Embedding of the empty prompt: tensors `(1, ...)` that are not part of the state dict."""

    def __init__(self, tensors: dict[str, Tensor]):
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)

    @property
    def tensors(self) -> dict[str, Tensor]:
        return dict(self.named_buffers())

    def forward(self, batch: int) -> dict[str, Tensor]:
        """Expand the embedding to `batch` samples."""
        tensors = self.tensors
        if not tensors:
            raise ValueError("classifier-free guidance needs the empty prompt (null.safetensors)")
        return {name: part.expand(batch, *part.shape[1:]) for name, part in tensors.items()}
