"""Files in a folder, a zip, or a single file, by name.

Hidden files are ignored; links to files and folders are followed. A folder in which two names lead
to one image is rejected: such an image would have twice the weight of others. Nothing is extracted
to disk.
"""

import os
import stat
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, Self

from harness.errors import UserError
from harness.io.artifacts import LFS_POINTER

INDEXES = ("dataset.json", "labels")  # EDM's lists of labels
TABLES = ("metadata.csv", "metadata.jsonl")  # Hugging Face's
IMAGES = (".png", ".jpg", ".jpeg", ".webp")
OTHER_IMAGES = (
    *(".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".ppm", ".tif", ".tiff"),
)
PACKED = (".parquet", ".npz")
MAX_IMAGE_BYTES, MAX_INDEX_BYTES = 1 << 27, 1 << 30  # unpacked


def _files_below(root: Path) -> tuple[dict[str, int], int]:
    """Sizes of the files in a folder and in folders that it links to, by name relative to it, and
    the number of hidden files and folders. Every folder and every file counts once: a link to
    another part of `root`, or to the target of another link, is an error, as is a link without a
    target, and a folder that cannot be read. The index may be a link to any file. In the cache of
    the Hugging Face hub equal files are links to one file."""

    def unreadable(error: OSError) -> None:
        raise UserError(f"{error.filename} could not be read ({error.strerror})", "unreadable")

    sizes, links, visited, hidden = {}, [], {}, 0
    for name, folders, files in os.walk(root, onerror=unreadable, followlinks=True):
        folder = Path(name)
        hidden += sum(name.startswith(".") for name in (*folders, *files))
        folders[:] = [name for name in sorted(folders) if not name.startswith(".")]
        first = visited.setdefault(folder.resolve(), folder)
        if first is not folder:
            message = f"{folder} and {first} are the same folder, by a symbolic link"
            raise UserError(f"{message}; the data set would contain its files twice", "link")
        for path in (folder / name for name in files if not name.startswith(".")):
            try:
                status = path.stat()
            except OSError as error:
                target = f" (a link to {os.readlink(path)})" if path.is_symlink() else ""
                message = f"{path}{target} could not be read ({error.strerror})"
                raise UserError(message, "dangling-link" if target else "unreadable") from None
            if stat.S_ISREG(status.st_mode):
                sizes[path.relative_to(root).as_posix()] = status.st_size
                index = folder == root and path.name in INDEXES
                links += [path] if path.is_symlink() and not index else []
    remedy = "pack the folder as a zip, where every name counts, or remove one of the names"
    targets: dict[Path, Path] = {}
    for path in sorted(links):
        target = path.resolve()
        first = targets.setdefault(target, path)
        if target.parent in visited and not target.name.startswith("."):
            message = f"{path} is a link to {target}, which is in the data set itself"
            raise UserError(f"{message}; {remedy}", "link")
        cached = target.parent.name == "blobs" and target.parents[1].name.startswith("datasets--")
        if first is not path and not cached:
            message = f"{path} and {first} are links to the same file, {target}"
            raise UserError(f"{message}; {remedy}", "link")
    return sizes, hidden


class Files:
    """The files in a zip or a folder, or one file of another kind, by name. Backslashes in names
    are separators, as Windows writes them. Threads may read at the same time.

    sizes: name -> bytes. hidden: number of files that are left out as hidden.
    """

    def __init__(self, path: Path):
        self.path, self._zip, self.hidden = path, None, 0
        if not path.exists():
            raise UserError(f"{path} does not exist", "missing-file")
        if path.is_dir():
            sizes, self.hidden = _files_below(path)
        elif path.suffix.lower() == ".parquet":
            sizes = {path.name: path.stat().st_size}
        else:
            sizes = self._open_zip(path)
            shown = {name for name in sizes if "/." not in f"/{name}".replace("\\", "/")}
            self.hidden = len(sizes) - len(shown)
            sizes = {name: size for name, size in sizes.items() if name in shown}
        self._stored = {name.replace("\\", "/"): name for name in sizes}
        if len(self._stored) < len(sizes):
            twice = next(name for name in sizes if name not in self._stored.values())
            raise UserError(f"{path} contains {twice} with \\ and with /", "duplicate-name")
        self.sizes = {name: sizes[stored] for name, stored in self._stored.items()}

    def _open_zip(self, path: Path) -> dict[str, int]:
        try:
            self._zip = zipfile.ZipFile(path)
        except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
            message = f"{path} is not a zip file, or is incomplete ({error})"
            raise UserError(message, "damaged") from None
        entries = [entry for entry in self._zip.infolist() if not entry.is_dir()]
        links = {e.filename for e in entries if stat.S_ISLNK(e.external_attr >> 16)}
        if others := sorted(name for name in links if Path(name).name not in INDEXES):
            message = f"{path}: {others[0]} is a symbolic link; pack the files, without zip's -y"
            raise UserError(message, "link")
        entries = [entry for entry in entries if entry.filename not in links]
        if twice := [e.filename for e in entries if self._zip.getinfo(e.filename) is not e]:
            raise UserError(f"{path} contains {twice[0]} more than once", "duplicate-name")
        return {entry.filename: entry.file_size for entry in entries}

    def below(self, folder: str) -> Self:
        """The files in a folder, such as "train", by their names in it."""
        part, prefix = object.__new__(type(self)), f"{folder}/"
        part.path, part._zip, part.hidden = self.path, self._zip, self.hidden
        inside = [name for name in self.sizes if name.startswith(prefix)]
        part.sizes = {name.removeprefix(prefix): self.sizes[name] for name in inside}
        part._stored = {name.removeprefix(prefix): self._stored[name] for name in inside}
        return part

    def where(self, name: str) -> str:
        """A file in a message."""
        stored = self._stored[name]
        return f"{self.path}" if self.path.name == stored else f"{self.path}: {stored}"

    def images(self) -> list[str]:
        """The names of the images, sorted. An image in a format that cannot be read is an error."""
        names = sorted(name for name in self.sizes if name.lower().endswith(IMAGES))
        if others := sorted(name for name in self.sizes if name.lower().endswith(OTHER_IMAGES)):
            message = "is not a PNG, JPEG or WebP file; convert it, or move it elsewhere"
            raise UserError(f"{self.where(others[0])} {message}", "image-format")
        return names

    def top_folders(self, names: Iterable[str]) -> list[str]:
        """The folders at the top that contain these files, sorted; "" for the top itself."""
        return sorted({name.partition("/")[0] if "/" in name else "" for name in names})

    def open(self, name: str) -> BinaryIO:
        """The content of a file as a stream."""
        try:
            if self._zip:
                return self._zip.open(self._stored[name])
            folder = self.path if self.path.is_dir() else self.path.parent
            return open(folder / self._stored[name], "rb")
        except (OSError, RuntimeError, NotImplementedError, zipfile.BadZipFile) as error:
            raise UserError(f"{self.where(name)} could not be read ({error})", "damaged") from None

    def read(self, name: str, limit: int | None = None) -> bytes:
        """The content of a file of at most `limit` bytes; default: MAX_IMAGE_BYTES."""
        where, size, limit = self.where(name), self.sizes[name], limit or MAX_IMAGE_BYTES
        if size > limit:
            raise UserError(f"{where} has {size} bytes, more than {limit}", "too-large")
        try:
            with self.open(name) as file:
                content = file.read()
        except (OSError, EOFError, RuntimeError, zlib.error, zipfile.BadZipFile) as error:
            raise UserError(f"{where} could not be read ({error})", "damaged") from None
        if content.startswith(LFS_POINTER):
            message = f"{where} is a pointer of Git LFS, not the file; run git lfs pull"
            raise UserError(message, "lfs-pointer")
        return content
