"""Data sets: uint8 images with labels, one fixed split into training and held-out part.

The split is stratified and depends on the data set alone: generators and feature networks train
on the training part, which is also the reference of every distance; the held-out part gives
accuracies and the real-against-real floor.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from harness.artifacts import load_tensors, read_json, save_tensors, write_json
from harness.streams import Stream

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True)
class Images:
    """`pixels` uint8 `(N, C, H, W)`, `labels` int64 `(N,)`."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.pixels)


@dataclass(frozen=True)
class Dataset:
    name: str
    train: Images
    held_out: Images
    class_names: tuple[str, ...]
    sha256: str
    statistics: Path | None = None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return tuple(self.train.pixels.shape[1:])

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


def to_model_space(pixels: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def to_pixels(x: Tensor) -> Tensor:
    """float in [-1, 1] -> uint8 by `x * 127.5 + 128`, clipped: EDM's quantisation."""
    return (x * 127.5 + 128).clip(0, 255).to(torch.uint8)


def _digits() -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """1,797 handwritten digits, 8 x 8, 17 grey levels (Alpaydin and Kaynak 1998; scikit-learn)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = torch.from_numpy(digits.images).mul(255 / 16).round().to(torch.uint8)
    return pixels.unsqueeze(1), torch.from_numpy(digits.target).long(), DIGIT_WORDS


SOURCES = {"digits": _digits}


def stratified_split(labels: Tensor, held_out: float) -> tuple[Tensor, Tensor]:
    """Indices of the training and the held-out part: `held_out` of each class, always the same."""
    rank = Stream(0, "split").uniform(torch.arange(len(labels)))
    chosen = []
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        order = members[rank[members].argsort()]
        chosen.append(order[: round(held_out * len(order))])
    mask = torch.zeros(len(labels), dtype=torch.bool)
    mask[torch.cat(chosen)] = True
    return (~mask).nonzero().flatten(), mask.nonzero().flatten()


def prepare(name: str, held_out: float, folder: Path) -> dict:
    """Read a data set from its source, split it and write it to `folder`; returns `data.json`."""
    pixels, labels, class_names = SOURCES[name]()
    train, held = stratified_split(labels, held_out)
    sha256 = save_tensors(
        folder / "images.safetensors",
        {
            "train_pixels": pixels[train],
            "train_labels": labels[train],
            "held_out_pixels": pixels[held],
            "held_out_labels": labels[held],
        },
    )
    record = {
        "name": name,
        "sha256": sha256,
        "class_names": list(class_names),
        "train_images": len(train),
        "held_out_images": len(held),
        "image_shape": list(pixels.shape[1:]),
    }
    write_json(folder / "data.json", record)
    return record


def load(folder: Path) -> Dataset:
    """The data set that `prepare` wrote."""
    record = read_json(folder / "data.json")
    tensors = load_tensors(folder / "images.safetensors", record["sha256"])
    return Dataset(
        record["name"],
        Images(tensors["train_pixels"], tensors["train_labels"]),
        Images(tensors["held_out_pixels"], tensors["held_out_labels"]),
        tuple(record["class_names"]),
        record["sha256"],
    )
