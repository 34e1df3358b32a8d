"""What a layout finds in a source: its images in order, and their labels. A layout is a subclass of
`Layout` in this package or a plug-in, registered under its name."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np

from harness.data.image_archive import Files
from harness.errors import UserError
from harness.registry import Registry

# Names of folders and files of a split, as Hugging Face's imagefolder knows them. The first part
# that exists is used; test data are held out.
SPLITS = {
    "train": ("train", "training"),
    "test": ("test", "testing", "eval", "evaluation"),
    "validation": ("validation", "valid", "val", "dev"),
}
TEXT_COLUMNS = ("text", "caption")
Content = bytes | np.ndarray  # of a file, or pixels uint8 (H, W, C)


@dataclass(frozen=True)
class Listing:
    """The images of one part of a source, before they are decoded.

    names: for messages and the log. contents: yields for each image a function that reads it;
    threads call these functions. labels: the class of each image, as a number or a name, or its
    text; None: `unlabelled` says why, as the end of a sentence. class_names: of the numbers, if the
    source names them. mixed: the images have no order by class, so that it may stay.
    """

    names: Sequence[str]
    contents: Callable[[], Iterator[Callable[[], Content]]]
    labels: Sequence[int] | Sequence[str] | None = None
    unlabelled: str = ""
    class_names: tuple[str, ...] | None = None
    mixed: bool = False


Parts = dict[str, Listing]  # the keys of SPLITS; "train" alone without a split


class Layout(ABC):
    """A layout of files. label_column: `data.label_column`."""

    description: ClassVar[str]  # for the log
    has_columns: ClassVar[bool] = False  # of which `data.label_column` may name one

    @classmethod
    @abstractmethod
    def accepts(cls, files: Files) -> bool:
        """Whether the files have this layout. At most one layout may accept a source."""

    @abstractmethod
    def parts(self, files: Files, label_column: str | None) -> Parts:
        """The images, by part. Nothing is decoded."""


LAYOUTS: Registry[type[Layout]] = Registry("layout", "harness.data.layouts", Layout)


def plugin_layouts() -> list[str]:
    """The hashes of the plug-in files that define layouts. Any of these may read a source."""
    return [sha256 for name in LAYOUTS if (sha256 := LAYOUTS.plugin_sha256(name))]


def file_contents(files: Files, names: Iterable[str]) -> Callable[[], Iterator]:
    """`Listing.contents` of image files."""
    return lambda: (partial(files.read, name) for name in names)


def split_of(name: str) -> str | None:
    """The part that a folder's name means; None for other names."""
    return next((part for part, names in SPLITS.items() if name.lower() in names), None)


def split_folders(folders: Sequence[str]) -> dict[str, str]:
    """Part -> folder, if all folders at the top of a source are parts, and one of them is for
    training; otherwise empty."""
    parts = {split_of(folder): folder for folder in folders}
    if None in parts or "train" not in parts or len(folders) == 1:
        return {}
    if len(parts) < len(folders):
        message = f"the folders {', '.join(folders)} name a part of the data more than once"
        raise UserError(message, "split")
    return parts


def find_column(
    where: str, columns: Sequence[str], known: Sequence[str], wanted: str | None = None
) -> str | None:
    """The column of labels or texts of a table: `data.label_column`, or the first of the known
    names; None if there is none of these."""
    if wanted is not None and wanted not in columns:
        message = f"{where} has no column {wanted!r}; its columns: {', '.join(columns)}"
        raise UserError(f"data.label_column: {message}", "label-column")
    return wanted or next((name for name in known if name in columns), None)


def same_type(where: str, names: Sequence[str], labels: list) -> list:
    """The labels, after a check that all are numbers, or all are names."""
    kind = type(labels[0]) if labels else int
    for name, label in zip(names, labels, strict=True):
        if type(label) is not kind or kind not in (int, str):
            message = f"{where} of {name} is {label!r}; expected only numbers, or only names"
            raise UserError(message, "labels")
    return labels
