"""1,797 handwritten digits, 8 x 8, 17 grey levels (Alpaydin and Kaynak 1998; scikit-learn)."""

import torch
from torch import Tensor

from harness.data.registry import DATASETS, DataSource, split

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def read_digits() -> tuple[Tensor, Tensor]:
    """Pixels uint8 `(1797, 1, 8, 8)` and labels int64 `(1797,)`."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = torch.from_numpy(digits.images).mul(255 / 16).round().to(torch.uint8)
    return pixels.unsqueeze(1), torch.from_numpy(digits.target).long()


@DATASETS.register("digits")
class Digits(DataSource):
    image_shape = (1, 8, 8)
    class_names = DIGIT_WORDS
    caption_templates = ("a handwritten digit {}", "the digit {}", "a scan of the number {}")

    def read(self):
        return *split(*read_digits(), self.section.held_out), self.class_names
