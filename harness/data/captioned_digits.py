"""Digits in colour with captions: a text-to-image data set whose images a program can check.

Each image shows one of scikit-learn's handwritten digits, 10 of the 16 pixels high, in one of four
inks on one of two grounds, on the left or on the right. A caption names all four attributes in one
of several wordings. Every digit is drawn several times with other attributes, always the same ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from harness.streams import Stream

SIZE, DIGIT = 16, 10  # pixels
COPIES = 8  # images of each handwritten digit
INKS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 230),
    "yellow": (240, 200, 40),
}
GROUNDS = {"black": (0, 0, 0), "white": (255, 255, 255)}
SIDES = ("left", "right")
DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WORDINGS = (
    "a {ink} {digit} on the {side} of a {ground} picture",
    "{ground} ground with a {digit} in {ink} ink to the {side}",
    "the number {digit}, {side}, {ink} on {ground}",
)
CHECKED = ("ink", "ground", "side")  # attributes that `seen` measures
ATTRIBUTES = {"digit": DIGIT_WORDS, "ink": tuple(INKS), "ground": tuple(GROUNDS), "side": SIDES}


# Captions of a class by its name, for sets of single digits; the first one is for scoring.
TEMPLATES = ("a handwritten digit {}", "the digit {}", "a scan of the number {}")


@dataclass(frozen=True)
class Attributes:
    """What the captions name, and a program that checks images for it (`Dataset.attributes`).

    names: the attributes that `check` measures. values: int64 `(captions, 4)`, what each caption
    names, in the order of `ATTRIBUTES`.
    """

    values: Tensor
    names: tuple[str, ...] = CHECKED

    def check(self, pixels: Tensor, labels: Tensor) -> Tensor:
        """Whether images uint8 `(B, C, H, W)` have the attributes that captions `labels` `(B,)`
        name: bool `(B, len(names))`."""
        return seen(pixels) == self.values[labels, 1:]

    def classes(self, labels: Tensor) -> Tensor:
        """The class that each caption names, int64 `(B,)`."""
        return self.values[labels, 0]

    def meanings(self) -> Tensor:
        """int64 `(captions,)`: equal numbers for captions that differ in wording only."""
        return self.values.unique(dim=0, return_inverse=True)[1]


def captions() -> tuple[tuple[str, ...], Attributes]:
    """All combinations of attributes, each in all wordings."""
    texts, rows = [], []
    for row in product(*(range(len(values)) for values in ATTRIBUTES.values())):
        named = {name: values[i] for (name, values), i in zip(ATTRIBUTES.items(), row, strict=True)}
        texts += [wording.format(**named) for wording in WORDINGS]
        rows += [row] * len(WORDINGS)
    return tuple(texts), Attributes(torch.tensor(rows))


def draw(digits: Tensor, labels: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Images uint8 `(COPIES N, 3, 16, 16)` and the numbers of their captions.

    `digits`: uint8 `(N, 1, 8, 8)`, `labels` `(N,)`; `numbers` `(N,)`: theirs in the whole set, by
    which attributes and places are drawn.
    """
    index = (numbers[:, None] * COPIES + torch.arange(COPIES)).flatten()
    stream = Stream(0, "captioned digits")
    ink, ground, side, wording = (
        stream.child(name).integers(index, count)
        for name, count in (
            ("ink", len(INKS)),
            ("ground", len(GROUNDS)),
            ("side", len(SIDES)),
            ("wording", len(WORDINGS)),
        )
    )
    digit = labels.repeat_interleave(COPIES)
    number = digit
    for part, values in ((ink, INKS), (ground, GROUNDS), (side, SIDES), (wording, WORDINGS)):
        number = number * len(values) + part
    strength = interpolate(digits.float() / 255, size=(DIGIT, DIGIT), mode="bilinear")
    strength = strength.repeat_interleave(COPIES, dim=0)
    room = SIZE - DIGIT + 1
    top = stream.child("top").integers(index, room)
    left = stream.child("left").integers(index, 2) + side * (room - 2)
    mask = torch.zeros(len(index), 1, SIZE, SIZE)
    rows = top[:, None] + torch.arange(DIGIT)
    columns = left[:, None] + torch.arange(DIGIT)
    mask[torch.arange(len(index))[:, None, None], 0, rows[:, :, None], columns[:, None]] = strength[
        :, 0
    ]
    inks, grounds = (
        torch.tensor(list(colours.values())).float()[chosen][:, :, None, None]
        for colours, chosen in ((INKS, ink), (GROUNDS, ground))
    )
    return (grounds + mask * (inks - grounds)).round().to(torch.uint8), number


def seen(pixels: Tensor) -> Tensor:
    """What images uint8 `(B, 3, 16, 16)` show of ink, ground and side: int64 `(B, 3)`.

    The ground is the colour nearest to the border's median; the ink, the one nearest to the mean of
    the tenth of the pixels that are furthest from the ground; the side, where their weight lies.
    """
    x = pixels.float()
    border = torch.cat([x[:, :, 0], x[:, :, -1], x[:, :, :, 0], x[:, :, :, -1]], dim=2)
    grounds = torch.tensor(list(GROUNDS.values())).float()
    ground = torch.cdist(border.median(dim=2).values, grounds).argmin(dim=1)
    away = (x - grounds[ground][:, :, None, None]).norm(dim=1)
    strongest = away.flatten(1).topk(SIZE * SIZE // 10, dim=1).indices
    ink = x.flatten(2).gather(2, strongest[:, None].expand(-1, 3, -1)).mean(dim=2)
    inks = torch.tensor(list(INKS.values())).float()
    # Strokes mix with the ground at their edges: what counts is the direction away from it.
    step = ink - grounds[ground]
    towards = inks[None] - grounds[ground][:, None]
    along = (step[:, None] * towards).sum(dim=2) / towards.norm(dim=2)
    columns = (torch.arange(SIZE) + 0.5)[None, None]
    centre = (away * columns).sum(dim=(1, 2)) / away.sum(dim=(1, 2)).clamp_min(1e-6)
    return torch.stack([along.argmax(dim=1), ground, (centre > SIZE / 2).long()], dim=1)
