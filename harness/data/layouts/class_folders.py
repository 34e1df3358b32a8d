"""Image files alone, as in torchvision's ImageFolder and Hugging Face's imagefolder: the first
folder of an image is its class. Files without folders have no labels."""

import re

from harness.data.image_archive import INDEXES, TABLES, Files
from harness.data.layouts.base import Layout, Listing, file_contents

EDM_NAME = re.compile(r"\d{5}/img\d{8}\.\w+")  # of EDM's layout, whose list of labels is missing


class ClassFolders(Layout):
    """Used where no registered layout accepts the files."""

    description = "class folders"

    @classmethod
    def accepts(cls, files):
        return True

    def parts(self, files, label_column):
        return {"train": _listing(files)}


def _listing(files: Files) -> Listing:
    names = files.images()
    contents, labels, reason = file_contents(files, names), None, ""
    top = files.top_folders(names) if names else []
    if names and all(map(EDM_NAME.fullmatch, names)):
        reason = f"has no labels in {INDEXES[0]}"
    elif top == [""]:
        reason = f"has no class folders, and no {INDEXES[0]} or {TABLES[0]}"
    elif "" in top:
        outside = next(name for name in names if "/" not in name)
        reason = f"has class folders, but {outside} is outside of them; move it"
    else:
        labels = [name.partition("/")[0] for name in names]
    return Listing(names, contents, labels, reason)
