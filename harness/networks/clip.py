"""A small CLIP (open_clip's model class) for small images and short captions."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize

from harness.data import DIGIT_WORDS

CONTEXT_LENGTH = 16  # captions here are short; the usual 77 would only cost time
# Captions of a class, the first of them the one that images are compared with.
DIGIT_TEMPLATES = ("a handwritten digit {}", "the digit {}", "a scan of the number {}")
TEMPLATES = ("a photo of a {}", "a {}", "a small picture of the {}")


def tokenize(captions: list[str]) -> Tensor:
    """int64 `(N, 16)`: open_clip's byte-pair tokens."""
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer(context_length=CONTEXT_LENGTH)(captions)


class SmallCLIP(nn.Module):
    """open_clip's `CLIP` on `(B, C, H, W)` images in [-1, 1]; embeddings have length 1.

    `captions`: int64 `(num_classes, templates, 16)`, kept with the weights, so that scoring needs
    no tokenizer.
    """

    embed_dim = 64

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int, width: int):
        super().__init__()
        from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

        self.size = image_shape[1]
        self.clip = CLIP(
            self.embed_dim,
            CLIPVisionCfg(
                layers=3,
                width=2 * width,
                head_width=16,
                patch_size=2 if self.size <= 16 else 4,
                image_size=self.size,
            ),
            CLIPTextCfg(context_length=CONTEXT_LENGTH, width=2 * width, heads=4, layers=2),
        )
        self.register_buffer(
            "captions", torch.zeros(num_classes, len(TEMPLATES), CONTEXT_LENGTH, dtype=torch.long)
        )

    def set_captions(self, class_names: tuple[str, ...]) -> None:
        templates = DIGIT_TEMPLATES if class_names == DIGIT_WORDS else TEMPLATES
        captions = [template.format(name) for name in class_names for template in templates]
        self.captions.copy_(tokenize(captions).view_as(self.captions))

    def features(self, x: Tensor) -> Tensor:
        """Image embeddings `(B, 64)`, normalised."""
        if x.shape[1] == 1:
            x = x.expand(-1, 3, -1, -1)
        if x.shape[-1] != self.size:
            x = interpolate(x, size=self.size, mode="bilinear", antialias=True)
        return self.clip.encode_image(x, normalize=True)

    def text_features(self, tokens: Tensor) -> Tensor:
        """Caption embeddings `(N, 64)`, normalised."""
        return normalize(self.clip.encode_text(tokens), dim=-1)

    def class_features(self) -> Tensor:
        """Embedding of each class's first caption, `(num_classes, 64)`."""
        return self.text_features(self.captions[:, 0])

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        """Scaled similarities `(B, N)`."""
        return self.clip.logit_scale.exp() * self.features(x) @ self.text_features(tokens).T
