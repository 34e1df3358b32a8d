"""Fashion-MNIST (Xiao, Rasul, Vollgraf 2017): 70,000 images, 28 x 28, grey, 10 classes.

The source is a folder with the four official files, compressed or not, such as
`/usr/share/datasets/fashion-mnist` of Debian's package `dataset-fashion-mnist`.
"""

import gzip
from pathlib import Path

import torch
from torch import Tensor

from harness.data.registry import DATASETS, OfficialSet
from harness.io.downloads import fetch

URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
SHA256 = {  # of the compressed files
    "train-images-idx3-ubyte": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
    "train-labels-idx1-ubyte": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
    "t10k-images-idx3-ubyte": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
    "t10k-labels-idx1-ubyte": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
}
HEADERS = (16, 8, 16, 8)  # bytes of each file


@DATASETS.register("fashion-mnist")
class FashionMnist(OfficialSet):
    image_shape = (1, 28, 28)
    class_names = (
        *("t-shirt", "trouser", "pullover", "dress", "coat"),
        *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
    )
    hashes = (
        "308c6213870624505959c710712dbe6debc9c2041d98fda2dccb47bcffbd3d84",
        "b7f140f1222993c13e87dc8277a29fffab35bf5fa0777d972356122e7320f6c6",
    )

    @classmethod
    def accepts(cls, path: Path) -> bool:
        return path.is_dir() and any(path.glob("t10k-images-idx3-ubyte*"))

    def read_parts(self, path):
        def content(name: str, header: int) -> Tensor:
            if path and (path / name).exists():
                data = (path / name).read_bytes()
            else:
                file = path / f"{name}.gz" if path else fetch(f"{URL}{name}.gz", SHA256[name])
                data = gzip.decompress(file.read_bytes())
            return torch.frombuffer(bytearray(data), dtype=torch.uint8, offset=header)

        train, train_labels, test, test_labels = map(content, SHA256, HEADERS)
        train, test = (pixels.reshape(-1, *self.image_shape) for pixels in (train, test))
        return (train, train_labels), (test, test_labels)
