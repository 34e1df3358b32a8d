"""A small CLIP (open_clip's model class) for small images and short captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize

from harness.data.datasets import Dataset

CONTEXT_LENGTH = 16  # captions here are short; the usual 77 would only cost time


def tokenize(captions: list[str]) -> Tensor:
    """int64 `(N, 16)`: open_clip's byte-pair tokens."""
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer(context_length=CONTEXT_LENGTH)(captions)


def text_width(width: int) -> int:
    """Numbers of a token in the text tower of a CLIP of this width."""
    return 2 * width


class SmallCLIP(nn.Module):
    """open_clip's `CLIP` on `(B, C, H, W)` images in [-1, 1]; embeddings have length 1.

    `captions`: int64 `(conditions, wordings, 16)`, kept with the weights, so that scoring needs
    no tokenizer: of each class in some wordings, or each caption of a set that has captions.
    """

    embed_dim = 64

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        conditions: int,
        width: int,
        wordings: int = 1,
    ):
        super().__init__()
        from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

        self.size = image_shape[1]
        self.clip = CLIP(
            self.embed_dim,
            CLIPVisionCfg(
                layers=3,
                width=2 * width,
                head_width=16,
                patch_size=2 if self.size < 16 else 4,
                image_size=self.size,
            ),
            CLIPTextCfg(context_length=CONTEXT_LENGTH, width=text_width(width), heads=4, layers=2),
        )
        self.register_buffer(
            "captions",
            torch.zeros(
                conditions,
                wordings,
                CONTEXT_LENGTH,
                dtype=torch.long,
            ),
        )
        # Captions of one number say the same in other words; needed in training alone.
        self.register_buffer("meaning", torch.arange(conditions), persistent=False)

    def set_captions(self, dataset: Dataset) -> None:
        names = dataset.class_names
        texts = [t.format(name) for name in names for t in dataset.caption_templates]
        if dataset.attributes:
            texts = list(dataset.prompts.texts)
            self.meaning.copy_(dataset.attributes.meanings())
        self.captions.copy_(tokenize(texts).view_as(self.captions))

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

    def token_features(self, tokens: Tensor) -> Tensor:
        """What the text tower makes of each token: `(N, 16, width)`."""
        clip = self.clip
        x = clip.token_embedding(tokens) + clip.positional_embedding
        return clip.ln_final(clip.transformer(x, attn_mask=clip.attn_mask))

    def class_features(self) -> Tensor:
        """Embedding of each class's first caption, or of each caption: `(conditions, 64)`."""
        return self.text_features(self.captions[:, 0])

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        """Scaled similarities `(B, N)`."""
        return self.clip.logit_scale.exp() * self.features(x) @ self.text_features(tokens).T


@dataclass(frozen=True)
class CaptionEncoder:
    """The text encoder of a trained CLIP, with the interface of a pipeline's text encoder."""

    clip: SmallCLIP
    sha256: str
    limit: int = CONTEXT_LENGTH

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> dict[str, Tensor]:
        tokens = tokenize(list(texts))
        # Padded as Stable Diffusion's texts are, with the mark of the end, where CLIP is taught to
        # sum up what it has read; at open_clip's zeros it is taught nothing.
        end = tokens.argmax(dim=1, keepdim=True)  # the greatest token there is
        tokens = torch.where(torch.arange(self.limit) > end, tokens.gather(1, end), tokens)
        return {"embeddings": self.clip.token_features(tokens)}

    def truncated(self, texts: Sequence[str]) -> int:
        from open_clip.tokenizer import SimpleTokenizer

        # Two tokens mark the beginning and the end.
        encode = SimpleTokenizer().encode
        return sum(len(encode(text)) + 2 > self.limit for text in texts)


def text_encoder(folder: Path, dataset: Dataset) -> CaptionEncoder:
    """That of the CLIP in a folder under features/."""
    from harness.features.train import load_feature_network

    network, record = load_feature_network(folder, dataset)
    return CaptionEncoder(network, record["sha256"])
