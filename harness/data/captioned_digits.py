"""Coloured digits with captions: a text-to-image data set whose images a program can check. Each of
scikit-learn's digits is drawn eight times, in one of four inks, on a black or white ground, on the
left or on the right. A caption names the four attributes in one of three wordings."""

from itertools import product

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from harness.data.digits import DIGIT_WORDS, Digits, read_digits
from harness.data.registry import DATASETS, AttributeChecker, Images, stratified_split
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
WORDINGS = (
    "a {ink} {digit} on the {side} of a {ground} picture",
    "{ground} ground with a {digit} in {ink} ink to the {side}",
    "the number {digit}, {side}, {ink} on {ground}",
)
ATTRIBUTES = {"digit": DIGIT_WORDS, "ink": tuple(INKS), "ground": tuple(GROUNDS), "side": SIDES}


def _colours(table: dict[str, tuple[int, int, int]]) -> Tensor:
    return torch.tensor(list(table.values())).float()


def captions() -> tuple[tuple[str, ...], AttributeChecker]:
    """All captions: each combination of attributes in each wording; and their checker."""
    words = [dict(zip(ATTRIBUTES, row, strict=True)) for row in product(*ATTRIBUTES.values())]
    texts = tuple(wording.format(**row) for row in words for wording in WORDINGS)
    values = torch.cartesian_prod(*(torch.arange(len(v)) for v in ATTRIBUTES.values()))
    values = values.repeat_interleave(len(WORDINGS), dim=0)
    return texts, AttributeChecker(values, tuple(ATTRIBUTES)[1:], measure)


@DATASETS.register("captioned-digits")
class CaptionedDigits(Digits):
    image_shape = (3, SIZE, SIZE)
    captions = staticmethod(captions)

    def read(self):
        """All drawings of a handwritten digit are in the same part."""
        pixels, labels = read_digits()
        parts = stratified_split(labels, self.section.held_out)
        train, held = (Images(*draw(pixels[part], labels[part], part)) for part in parts)
        return train, held, self.class_names


def draw(digits: Tensor, labels: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Images uint8 `(COPIES N, 3, 16, 16)` and the numbers of their captions.

    `digits`: uint8 `(N, 1, 8, 8)`; `labels` `(N,)`; `numbers` `(N,)`: positions in the whole data
    set, which seed the attributes and positions.
    """
    index = (numbers[:, None] * COPIES + torch.arange(COPIES)).flatten()
    stream, chosen = Stream(0, "captioned digits"), {}
    caption = labels.repeat_interleave(COPIES)
    choices = {"ink": INKS, "ground": GROUNDS, "side": SIDES, "wording": WORDINGS}
    for name, values in choices.items():
        chosen[name] = stream.child(name).integers(index, len(values))
        caption = caption * len(values) + chosen[name]
    strength = interpolate(digits.float() / 255, size=(DIGIT, DIGIT), mode="bilinear")
    strength = strength.repeat_interleave(COPIES, dim=0)
    room = SIZE - DIGIT + 1
    top = stream.child("top").integers(index, room)
    left = stream.child("left").integers(index, 2) + chosen["side"] * (room - 2)
    rows = (top[:, None] + torch.arange(DIGIT))[:, :, None]
    columns = (left[:, None] + torch.arange(DIGIT))[:, None]
    mask = torch.zeros(len(index), 1, SIZE, SIZE)
    mask[torch.arange(len(index))[:, None, None], 0, rows, columns] = strength[:, 0]
    inks = _colours(INKS)[chosen["ink"]][:, :, None, None]
    grounds = _colours(GROUNDS)[chosen["ground"]][:, :, None, None]
    return (grounds + mask * (inks - grounds)).round().to(torch.uint8), caption


def measure(pixels: Tensor) -> Tensor:
    """Ink, ground and side of images uint8 `(B, 3, 16, 16)`: int64 `(B, 3)`.

    The ground is the colour nearest to the median of the border. The ink is the colour nearest to
    the mean of the tenth of the pixels furthest from the ground, by direction: strokes mix with the
    ground at their edges. The side is that of the centre of the distances from the ground.
    """
    x = pixels.float()
    border = torch.cat([x[:, :, 0], x[:, :, -1], x[:, :, :, 0], x[:, :, :, -1]], dim=2)
    ground = torch.cdist(border.median(dim=2).values, _colours(GROUNDS)).argmin(dim=1)
    colour = _colours(GROUNDS)[ground]
    distance = (x - colour[:, :, None, None]).norm(dim=1)
    strongest = distance.flatten(1).topk(SIZE * SIZE // 10, dim=1).indices
    ink = x.flatten(2).gather(2, strongest[:, None].expand(-1, 3, -1)).mean(dim=2)
    directions = _colours(INKS)[None] - colour[:, None]
    projection = ((ink - colour)[:, None] * directions).sum(dim=2) / directions.norm(dim=2)
    columns = (torch.arange(SIZE) + 0.5)[None, None]
    centre = (distance * columns).sum(dim=(1, 2)) / distance.sum(dim=(1, 2)).clamp_min(1e-6)
    return torch.stack([projection.argmax(dim=1), ground, (centre > SIZE / 2).long()], dim=1)
