"""Aesthetic heads on normalised CLIP image embeddings. LAION's predict how much people like a
picture. One trained on the data set predicts legibility: images are degraded by a known strength,
and the target is 10 (1 - strength); other degradations measure how well this generalises."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, mse_loss, normalize, pad
from torch.special import ndtr

from harness.data.datasets import Dataset, Images
from harness.denoiser import to_model_space, to_pixels
from harness.features.base import load_in_order
from harness.io.artifacts import save_tensors
from harness.io.downloads import fetch, load_pickled
from harness.streams import Stream, seeded

WEIGHTS = "aesthetic.safetensors"
SCALE = 10.0
ROUNDS, STEPS = 3, 400  # degradations of each image, and updates, in training
HEAD_IMAGES = 4096  # the first of each part; enough for such a small head

# Version -> address and sha256. The heads belong to OpenAI's ViT-L/14.
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


class AestheticHead(nn.Module):
    """Ratings `(B,)` of CLIP image embeddings `(B, D)`."""

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, embeddings: Tensor) -> Tensor:
        return self.layers(normalize(embeddings, dim=-1)).squeeze(-1)


def laion_head(version: str) -> AestheticHead:
    """LAION's ratings, about 1 to 10, of OpenAI's ViT-L/14; a `UserError` if the download fails.
    v1 is one linear layer; v2 ("improved") is five linear layers without activations."""
    weights = load_pickled(fetch(*LAION_HEADS[version]))
    shapes = [value.shape for value in weights.values() if value.dim() == 2]
    head = AestheticHead(*(nn.Linear(width, out) for out, width in shapes))
    load_in_order(head, weights)
    return head.eval().requires_grad_(False)


def new_head(dim: int) -> AestheticHead:
    """The untrained head of a small CLIP: one hidden layer."""
    return AestheticHead(nn.Linear(dim, 64), nn.GELU(), nn.Linear(64, 1))


# Degradations of images `x` in [-1, 1], where -1 is the background, `(B, C, H, W)`, by a strength
# `s` `(B, 1, 1, 1)` in [0, 1], with standard normal noise `n` of the same shape as `x`.


def _blur(x: Tensor, s: Tensor, n: Tensor) -> Tensor:
    """Mix with a wide binomial blur."""
    row = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0])
    kernel = (row[:, None] * row / 256).expand(x.shape[1], 1, 5, 5)
    wide = x
    for _ in range(2):
        wide = conv2d(pad(wide, (2, 2, 2, 2), value=-1.0), kernel, groups=x.shape[1])
    return (1 - s) * x + s * wide


def _salt(x: Tensor, s: Tensor, n: Tensor) -> Tensor:
    """Set pixels to black or white, with probability `s` in total."""
    u = ndtr(n)
    return torch.where(u > 1 - s / 2, 1.0, torch.where(u < s / 2, -1.0, x))


def _shuffle(x: Tensor, s: Tensor, n: Tensor) -> Tensor:
    """Replace pixels by others of the image, each with probability `s`."""
    moved = x.flatten(2).gather(2, n.flatten(2).argsort(dim=2)).view_as(x)
    return torch.where(ndtr(n) < s, moved, x)


KNOWN = {
    "noise": lambda x, s, n: x + 1.5 * s * n,
    "blur": _blur,
    "fade": lambda x, s, n: -1 + (x + 1) * (1 - s),  # to the background
    "drop": lambda x, s, n: torch.where(ndtr(n) < s, -1.0, x),  # pixels, with probability s
}
UNSEEN = {
    "salt": _salt,
    "overlay": lambda x, s, n: torch.maximum(x, -1 + s * (x.roll(1, dims=0) + 1)),
    "shuffle": _shuffle,
}


@torch.no_grad()
def _embedded(clip: nn.Module, images: Images, kind: str, number: int) -> tuple[Tensor, Tensor]:
    """Embeddings of degraded images, quantised like all scored images, and their target ratings."""
    index = torch.arange(min(len(images), HEAD_IMAGES))
    stream = Stream(number, "legibility", kind)
    strength = stream.child("strength").uniform(index)
    x = to_model_space(images.pixels[: len(index)])
    noise = stream.normal(index, tuple(x.shape[1:]))
    x = (KNOWN | UNSEEN)[kind](x, strength.view(-1, 1, 1, 1), noise)
    return clip.features(to_model_space(to_pixels(x))), SCALE * (1 - strength)


def train_head(clip: nn.Module, dataset: Dataset, folder: Path) -> dict:
    """Train a head on the embeddings `clip.features(x)` and write its weights. Returns its record:
    rank correlations on held-out images (none if nothing is held out) and the file's sha256."""
    from scipy.stats import spearmanr

    parts = [_embedded(clip, dataset.train, kind, n) for n in range(ROUNDS) for kind in KNOWN]
    embeddings, targets = map(torch.cat, zip(*parts, strict=True))
    with seeded(0):
        head = new_head(embeddings.shape[1])
    nn.init.constant_(head.layers[-1].bias, SCALE / 2)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2, weight_decay=1e-2, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        loss = mse_loss(head(embeddings), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    head.requires_grad_(False)
    record: dict = {}
    for group, kinds in (("known", KNOWN), ("unseen", UNSEEN)):
        correlations = record.setdefault(f"rank_correlation_{group}", {})
        for kind in kinds if len(dataset.held_out) else ():
            x, target = _embedded(clip, dataset.held_out, kind, ROUNDS)
            correlations[kind] = round(float(spearmanr(head(x), target).statistic), 4)
    return record | {"sha256": save_tensors(folder / WEIGHTS, head.state_dict())}
