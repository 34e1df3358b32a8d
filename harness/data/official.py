"""Base class of data sets with official files: their test set is the held-out part.

Images and labels are verified after reading, so that every source gives the same data.
"""

import hashlib
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from harness.data.registry import FILE_KEYS, DataSource, Images
from harness.errors import UserError

# Images and labels of one part: uint8 (N, C, H, W) and (N,).
Part = tuple[Tensor, Tensor]


class OfficialSet(DataSource):
    """Base class. hashes: sha256 of labels and pixels of the training and the test part."""

    description = "a data set with a test set"
    keys = FILE_KEYS
    hashes: ClassVar[tuple[str, str]]

    def read_parts(self, path: Path | None) -> tuple[Part, Part]:
        """The training and the test part from a `data.source`; None: download it."""
        raise NotImplementedError

    def read(self):
        path = self.local_source() if self.section.source else None
        try:
            parts = self.read_parts(path)
        except UserError as error:
            if path is not None:
                raise
            message = f"{self.section.name}: {error}; or set data.source to a local copy"
            raise UserError(message, error.code) from None
        except Exception as error:  # of any of the libraries that read the files
            reason = str(error) or type(error).__name__
            message = f"{path}: {self.section.name} could not be read ({reason})"
            raise UserError(message, "damaged") from None
        self.verify(path, parts)
        labelled = self.section.labels
        train, test = (Images(pixels, labels.long() * labelled) for pixels, labels in parts)
        return train, test, self.class_names if labelled else ()

    @classmethod
    def verify(cls, path: Path | None, parts: tuple[Part, Part]) -> None:
        """Raise an error if images or labels differ from the official ones."""
        names = ("training", "test")
        for part, (pixels, labels), sha256 in zip(names, parts, cls.hashes, strict=True):
            found = hashlib.sha256(labels.numpy())
            found.update(pixels.contiguous().numpy())
            if found.hexdigest() != sha256:
                message = f"{path}: these are not the {part} images of {cls.__name__}"
                raise UserError(message, "checksum")
