"""An aesthetic predictor: a head on normalised CLIP image embeddings, as LAION's.

LAION's heads rate how much people like a picture. On digits the head is trained here to rate
legibility: real training digits are degraded by known kinds at known strength, and the target is
10 (1 - strength). Kinds that it never saw, on held-out digits, tell whether this carries over.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, mse_loss, normalize, pad

from harness.data.datasets import Dataset, Images
from harness.denoiser import to_model_space, to_pixels
from harness.io.downloads import fetch, load_pickled
from harness.streams import Stream

SCALE = 10.0


class AestheticHead(nn.Module):
    """Rating of normalised CLIP image embeddings `(B, D)` -> `(B,)`: a linear layer (`hidden` 0,
    LAION's first predictor) or one hidden layer."""

    def __init__(self, dim: int, hidden: int = 64):
        super().__init__()
        layers = (
            [nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, 1)]
            if hidden
            else [nn.Linear(dim, 1)]
        )
        self.layers = nn.Sequential(*layers)

    def forward(self, embeddings: Tensor) -> Tensor:
        return self.layers(normalize(embeddings, dim=-1)).squeeze(-1)


# Version -> address and sha256.
LAION_HEADS = {
    "v1": (
        "https://github.com/LAION-AI/aesthetic-predictor/raw/main/sa_0_4_vit_l_14_linear.pth",
        "2cd4e60f4f24ae3bcd57b847b13c1f3ba27edc28cc1a7f9ce74ee9f421243cba",
    ),
    "v2": (
        "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/"
        "sac+logos+ava1-l14-linearMSE.pth",
        "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
    ),
}


class LaionHead(nn.Module):
    """LAION's ratings of OpenAI's ViT-L/14 embeddings `(B, 768)`, normalised here, about 1 to 10:
    v1 is a linear layer; v2 ("improved") five, with nothing between them but dropout."""

    def __init__(self, weights: dict[str, Tensor]):
        super().__init__()
        if set(weights) == {"weight", "bias"}:
            weights = {f"layers.0.{name}": value for name, value in weights.items()}
        # The dropout layers between are counted, so the numbers have gaps.
        numbers = sorted({int(name.split(".")[1]) for name in weights})
        shapes = [weights[f"layers.{n}.weight"].shape for n in numbers]
        self.layers = nn.Sequential(*[nn.Linear(width, out) for out, width in shapes])
        for layer, n in zip(self.layers, numbers, strict=True):
            layer.load_state_dict({k: weights[f"layers.{n}.{k}"] for k in ("weight", "bias")})
        self.eval().requires_grad_(False)

    def forward(self, embeddings: Tensor) -> Tensor:
        return self.layers(normalize(embeddings, dim=-1)).squeeze(-1)

    @classmethod
    def published(cls, version: str) -> LaionHead:
        """The head of a version, downloaded once; a `UserError` where it cannot be had."""
        path = fetch(*LAION_HEADS[version])
        return cls(load_pickled(path))


# Degradations: images in [-1, 1] `(B, C, H, W)`, strength `(B, 1, 1, 1)` in [0, 1], and standard
# normal numbers of the images' shape to draw from.


def _noise(x: Tensor, s: Tensor, n: Tensor) -> Tensor:
    return x + 1.5 * s * n


def _blur(x: Tensor, s: Tensor, n: Tensor) -> Tensor:
    """Mix with a wide binomial blur."""
    row = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0])
    kernel = (row[:, None] * row / 256).expand(x.shape[1], 1, 5, 5)
    wide = x
    for _ in range(2):
        wide = conv2d(pad(wide, (2, 2, 2, 2), value=-1.0), kernel, groups=x.shape[1])
    return (1 - s) * x + s * wide


def _fade(x: Tensor, s: Tensor, n: Tensor) -> Tensor:
    """Ink fades into the paper."""
    return -1 + (x + 1) * (1 - s)


def _drop(x: Tensor, s: Tensor, n: Tensor) -> Tensor:
    """Pixels turn to paper, each with probability `s`."""
    return torch.where(torch.special.ndtr(n) < s, torch.full_like(x, -1.0), x)


def _salt(x: Tensor, s: Tensor, n: Tensor) -> Tensor:
    """Pixels turn to black or white, together with probability `s`."""
    u = torch.special.ndtr(n)
    x = torch.where(u < s / 2, torch.full_like(x, -1.0), x)
    return torch.where(u > 1 - s / 2, torch.full_like(x, 1.0), x)


def _overlay(x: Tensor, s: Tensor, n: Tensor) -> Tensor:
    """Another image of the batch shines through."""
    return torch.maximum(x, -1 + s * (x.roll(1, dims=0) + 1))


def _shuffle(x: Tensor, s: Tensor, n: Tensor) -> Tensor:
    """Pixels change places with others of the image, each with probability `s`."""
    moved = x.flatten(2).gather(2, n.flatten(2).argsort(dim=2)).view_as(x)
    return torch.where(torch.special.ndtr(n) < s, moved, x)


HEAD_IMAGES = 4096  # of each part, the first: so small a head asks for no more
KNOWN = {"noise": _noise, "blur": _blur, "fade": _fade, "drop": _drop}
UNSEEN = {"salt": _salt, "overlay": _overlay, "shuffle": _shuffle}


def _degraded(images: Images, kind: str, degrade, round: int) -> tuple[Tensor, Tensor]:
    """Degraded images (quantised, as everything that is scored) and target ratings."""
    index = torch.arange(min(len(images), HEAD_IMAGES))
    stream = Stream(round, "legibility", kind)
    strength = stream.child("strength").uniform(index)
    x = to_model_space(images.pixels[: len(index)])
    x = degrade(x, strength.view(-1, 1, 1, 1), stream.normal(index, tuple(x.shape[1:])))
    x = to_model_space(to_pixels(x))
    return x, SCALE * (1 - strength)


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation."""
    from scipy.stats import spearmanr

    return float(spearmanr(a.numpy(), b.numpy()).statistic)


def train_head(clip: nn.Module, dataset: Dataset, rounds: int = 3, steps: int = 400):
    """Train a head on `clip`'s embeddings; returns it and its rank correlations when held out
    (none without a held-out part)."""
    with torch.no_grad():
        parts = [
            _degraded(dataset.train, kind, degrade, r)
            for r in range(rounds)
            for kind, degrade in KNOWN.items()
        ]
        embeddings = torch.cat([clip.features(x) for x, _ in parts])
        targets = torch.cat([t for _, t in parts])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = AestheticHead(embeddings.shape[1])
    nn.init.constant_(head.layers[-1].bias, SCALE / 2)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2, weight_decay=1e-2, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        loss = mse_loss(head(embeddings), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    quality: dict = {"rank_correlation_known": {}, "rank_correlation_unseen": {}}
    if not len(dataset.held_out):
        return head.eval().requires_grad_(False), quality
    with torch.no_grad():
        for group, kinds in (("known", KNOWN), ("unseen", UNSEEN)):
            for kind, degrade in kinds.items():
                x, target = _degraded(dataset.held_out, kind, degrade, rounds)
                rating = head(clip.features(x))
                quality[f"rank_correlation_{group}"][kind] = round(spearman(rating, target), 4)
    return head.eval().requires_grad_(False), quality
