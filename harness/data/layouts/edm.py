"""The layout of EDM's dataset tool (Karras et al. 2022, arXiv 2206.00364): images, and
`dataset.json` or `labels` with `{"labels": [["00000/img00000000.png", 6], ...]}`, or null."""

import codecs

from pydantic import BaseModel, ValidationError

from harness.data.image_archive import INDEXES, MAX_INDEX_BYTES, Files
from harness.data.layouts.base import LAYOUTS, Layout, Listing, file_contents
from harness.errors import UserError


class _Index(BaseModel):
    labels: list[tuple[str, int]] | None


@LAYOUTS.register("edm")
class EdmLayout(Layout):
    description = "EDM's layout"

    @classmethod
    def accepts(cls, files):
        return any(name in files.sizes for name in INDEXES)

    def parts(self, files, label_column):
        names = files.images()
        entries, index = _entries(files)
        labels, reason = None, f"{files.where(index)} has no labels"
        if entries is not None:
            labels = _labels(files.where(index), entries, names)
        # The tool keeps the order of its source, which may be class by class.
        mixed = labels is not None and labels != sorted(labels)
        contents = file_contents(files, names)
        return {"train": Listing(names, contents, labels, reason, mixed=mixed)}


def _entries(files: Files) -> tuple[list[tuple[str, int]] | None, str]:
    """The list of labels and its file."""
    index = next(name for name in INDEXES if name in files.sizes)
    content = files.read(index, MAX_INDEX_BYTES).removeprefix(codecs.BOM_UTF8)
    try:
        return _Index.model_validate_json(content, strict=True).labels, index
    except ValidationError as error:
        form, message = '{"labels": [[file name, class], ...]}', error.errors()[0]["msg"]
        raise UserError(f"{files.where(index)}: expected {form}; {message}", "labels") from None


def _labels(where: str, entries: list[tuple[str, int]], names: list[str]) -> list[int]:
    """The label of each image. As in EDM's reader, backslashes in names are separators."""
    labels = {name.replace("\\", "/"): label for name, label in entries}
    if missing := sorted(set(names) - labels.keys()):
        found = f"{len(entries)} labels for {len(names)} images"
        raise UserError(f"{where} has {found}, and none for {missing[0]}", "labels")
    if len(entries) != len(names):
        unused = sorted(labels.keys() - set(names)) or ["an image that has another"]
        message = f"has {len(entries)} labels for {len(names)} images, and one for {unused[0]}"
        raise UserError(f"{where} {message}", "labels")
    return [labels[name] for name in names]
