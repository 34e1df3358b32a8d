"""Official data sets that torchvision reads: their test set is the held-out part.

Files are checked before torchvision reads them, and the images and labels afterwards, so that every
source gives the same data. `tools/dataset_from_package.py` converts packages with the same images
into a source.
"""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from harness.data.registry import FILE_KEYS, DataSource, Images
from harness.errors import UserError
from harness.io.artifacts import load_tensors

# Images and labels of one part: uint8 (N, C, H, W) and (N,).
Part = tuple[np.ndarray, np.ndarray]
CONVERTED = "images.safetensors"  # written by tools/dataset_from_package.py


class TorchvisionSet(DataSource):
    """Base class. hashes: sha256 of labels and pixels of the training and the test part.

    Subclasses implement `accepts_official`, `download` and `unpack`.
    """

    description = "a data set with a test set"
    keys = FILE_KEYS
    hashes: ClassVar[tuple[str, str]]
    dataset: ClassVar[str]  # the class in torchvision.datasets

    @classmethod
    def accepts(cls, path: Path) -> bool:
        return (path / CONVERTED).is_file() or cls.accepts_official(path)

    @classmethod
    def accepts_official(cls, path: Path) -> bool:
        """Whether a path has the official files."""
        raise NotImplementedError

    def download(self) -> Path:
        """Fetch the official files; returns a path that `unpack` takes."""
        raise NotImplementedError

    def unpack(self, source: Path, root: Path) -> None:
        """Check the official files and put them where torchvision looks below `root`."""
        raise NotImplementedError

    def read(self):
        path = self.local_source() if self.section.source else self._download()
        parts = self.read_parts(path)
        train, test = (
            Images(torch.from_numpy(pixels), torch.from_numpy(labels).long() * self.section.labels)
            for pixels, labels in parts
        )
        return train, test, self.class_names if self.section.labels else ()

    def _download(self) -> Path:
        try:
            return self.download()
        except UserError as error:
            message = (
                f"could not download {self.dataset} ({error}); set data.source to a local copy"
            )
            raise UserError(message, error.code) from None

    def read_parts(self, path: Path) -> tuple[Part, Part]:
        """The training and the test part from a converted folder or the official files."""
        if (path / CONVERTED).is_file():
            tensors = load_tensors(path / CONVERTED)
            parts = tuple(
                tuple(tensors[f"{part}_{name}"].numpy() for name in ("pixels", "labels"))
                for part in ("train", "test")
            )
        else:
            with tempfile.TemporaryDirectory() as root:
                try:
                    self.unpack(path, Path(root))
                    parts = self._read_torchvision(Path(root))
                except UserError:
                    raise
                except Exception as error:  # torchvision has no errors of its own
                    reason = str(error) or type(error).__name__
                    message = f"{path}: {self.dataset} could not be read ({reason})"
                    raise UserError(message, "damaged") from None
        self.verify(path, parts)
        return parts

    def _read_torchvision(self, root: Path) -> tuple[Part, Part]:
        from torchvision import datasets

        channels, height, width = self.shape
        parts = []
        for train in (True, False):
            data = getattr(datasets, self.dataset)(root, train=train)
            pixels = np.asarray(data.data).reshape(-1, height, width, channels)
            labels = np.asarray(data.targets).astype(np.uint8)
            parts.append((np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)), labels))
        return tuple(parts)

    @classmethod
    def verify(cls, path: Path, parts: tuple[Part, Part]) -> None:
        """Raise an error if images or labels differ from the official ones."""
        for part, (pixels, labels), sha256 in zip(
            ("training", "test"), parts, cls.hashes, strict=True
        ):
            found = hashlib.sha256(np.ascontiguousarray(labels))
            found.update(np.ascontiguousarray(pixels))
            if found.hexdigest() != sha256:
                message = f"{path}: these are not the {part} images of {cls.dataset}"
                raise UserError(message, "checksum")
