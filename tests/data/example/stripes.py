"""A data set: noisy 8 x 8 images with horizontal or vertical stripes, as a plug-in file."""

import torch

from harness.data.registry import DATASETS, DataSource, split
from harness.streams import Stream


@DATASETS.register("stripes")
class Stripes(DataSource):
    """Noisy 8 x 8 images with stripes: horizontal or vertical."""

    image_shape = (1, 8, 8)
    class_names = ("horizontal", "vertical")

    def read(self):
        index = torch.arange(1600)
        labels, phase = index % 2, (index // 2) % 4
        rows = ((torch.arange(8) + phase[:, None]) % 4 < 2).float().mul(200)[:, :, None]
        images = torch.where(labels.bool()[:, None, None], rows.transpose(1, 2), rows)
        images = images.expand(-1, 8, 8) + 50 * Stream(0, "stripes").uniform(index, (8, 8))
        pixels = images.to(torch.uint8)[:, None]
        return *split(pixels, labels, self.section.held_out), self.class_names
