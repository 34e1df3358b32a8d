"""Orders that mix the classes: any consecutive images contain all classes in proportion. Metrics at
smaller sample sizes, and their standard errors, use consecutive images."""

import hashlib

import torch
from torch import Tensor

from harness.streams import Stream


def mixed_order(labels: Tensor) -> Tensor:
    """A permutation that depends on the labels alone, int64 `(N,)`. labels: int64 `(N,)`.

    The images of a class are shuffled by a fixed seed and spread evenly: of any n consecutive
    images a class with the share p has p n, up to one or two.
    """
    stream, index = Stream(0, "mixed order"), torch.arange(len(labels))
    shuffled = stream.uniform(index).argsort(stable=True)
    place, jitter = torch.empty(len(labels), dtype=torch.float64), stream.child("jitter")
    for label in labels.unique():
        members = shuffled[labels[shuffled] == label]
        rank = torch.arange(len(members))
        # Image r of m is placed at random in the r-th of m equal intervals.
        place[members] = (rank + jitter.uniform(members).double()) / len(members)
    return place.argsort(stable=True)


def content_order(pixels: Tensor, labels: Tensor) -> Tensor:
    """A mixed order that depends on the images and their labels, not on their given order: int64
    `(N,)`. pixels: uint8 `(N, C, H, W)`; labels: int64 `(N,)`."""
    keys = [
        (label, hashlib.sha256(image.contiguous().numpy()).digest())
        for image, label in zip(pixels, labels.tolist(), strict=True)
    ]
    canonical = torch.tensor(sorted(range(len(keys)), key=keys.__getitem__), dtype=torch.int64)
    return canonical[mixed_order(labels[canonical])]
