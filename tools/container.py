"""Files in a folder of parts of limited size, for transfers: the format of `tools.pack`.

The contents of the files follow each other in the order of their paths, compressed as one zlib
stream that is cut into parts. `manifest.json` lists the files and the parts with their sha256, and
the links between files. Equal contents give equal bytes. Reading trusts nothing: names are checked
before use, and every hash is verified before a file is written.
"""

import hashlib
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from harness.errors import UserError
from harness.io.artifacts import sha256_file
from harness.io.records import Record

PART = 15_000_000  # bytes of a part at most
BLOCK = 1 << 20  # bytes that are read at a time
MANIFEST = "manifest.json"
HISTORY = "slices.json"  # of tools.slice
# What a results folder contains: folders in the order of the stages, and single files.
FOLDERS = ("data", "features", "teachers", "pairs", "students", "scores", "tables", "figures")
FILES = ("report.html", "manifest.json", HISTORY)
# A name of a file or folder: no empty or hidden ones, no "..", drive or backslash.
NAME = re.compile(r"[A-Za-z0-9_+][A-Za-z0-9._+-]*")


Positive = Annotated[int, Field(ge=1)]


class Entry(BaseModel):
    model_config = ConfigDict(extra="forbid")

    size: int = Field(ge=0)
    sha256: str


class PartEntry(Entry):
    file: str


class Mosaic(PartEntry):
    """A picture of some images (`tools.mosaics`). shard: file of the tensor; tensor: its name."""

    shard: str
    tensor: str
    first: int
    shape: tuple[Positive, Positive, Positive, Positive]  # (N, C, H, W)


class Code(BaseModel):
    """The code that made a pack. sha256: of all Python sources."""

    model_config = ConfigDict(extra="forbid")

    commit: str | None = None
    dirty: bool | None = None
    sha256: str


class Origin(BaseModel):
    """A pack that was unpacked: the sha256 of its manifest, and what it said of itself."""

    model_config = ConfigDict(extra="forbid")

    pack: str
    code: Code
    devices: dict[str, str]
    stages: list[str]


class Manifest(Record):
    """What a pack contains, and where it comes from."""

    FORMAT: ClassVar[int] = 1
    kind: str  # "results" or "images"
    experiment: dict[str, Any]  # the resolved configuration
    code: Code
    data: str | None = None  # sha256 of the data set
    devices: dict[str, str] = Field(default_factory=dict)  # stage -> device
    stages: list[str] = Field(default_factory=list)
    origins: list[Origin] = Field(default_factory=list)  # packs that were unpacked before
    files: dict[str, Entry] = Field(default_factory=dict)
    links: dict[str, str] = Field(default_factory=dict)  # path -> file or folder of this pack
    parts: list[PartEntry] = Field(default_factory=list)
    shards: dict[str, Entry] = Field(default_factory=dict)  # files that are rebuilt from mosaics
    mosaics: list[Mosaic] = Field(default_factory=list)


def refuse(folder: Path, reason: str, code: str = "damaged") -> UserError:
    return UserError(f"{folder}: {reason}", code)


def write_parts(
    folder: Path, files: Mapping[str, Path], size: int = PART
) -> tuple[dict[str, Entry], list[PartEntry]]:
    """Write the parts of some files (path in the pack -> file) to a folder."""
    packer, entries, parts = zlib.compressobj(6), {}, []
    pending = bytearray()

    def flush(all_of_it: bool = False) -> None:
        while len(pending) >= size or (all_of_it and pending):
            content = bytes(pending[:size])
            del pending[:size]
            name = f"part-{len(parts):03d}.bin"
            (folder / name).write_bytes(content)
            sha256 = hashlib.sha256(content).hexdigest()
            parts.append(PartEntry(file=name, size=len(content), sha256=sha256))

    for path in sorted(files):
        digest, length = hashlib.sha256(), 0
        with open(files[path], "rb") as file:
            while block := file.read(BLOCK):
                digest.update(block)
                length += len(block)
                pending += packer.compress(block)
                flush()
        entries[path] = Entry(size=length, sha256=digest.hexdigest())
    pending += packer.flush()
    flush(all_of_it=True)
    return entries, parts


class Pack:
    """A folder that `tools.pack` wrote. Raises a `UserError` if its manifest is not valid."""

    def __init__(self, folder: Path):
        self.folder = folder
        if not (folder / MANIFEST).is_file():
            raise refuse(folder, f"has no {MANIFEST}; give a folder that tools.pack wrote", "pack")
        try:
            self.manifest = manifest = Manifest.read(folder / MANIFEST)
        except UserError as error:  # without the remedy, which is that for results
            reason = str(error).rpartition("; ")[0]
            remedy = "give a folder that tools.pack wrote, or copy it again"
            raise UserError(f"{reason}; {remedy}", error.code) from None
        for path in (*manifest.files, *manifest.links, *manifest.links.values(), *manifest.shards):
            check_name(folder, path)
        for part in (*manifest.parts, *manifest.mosaics):
            if not NAME.fullmatch(part.file):
                raise refuse(folder, f"the name {part.file!r} is not allowed", "unsafe")
        files = {*manifest.files, *manifest.shards}
        for path in files:
            if folder_file := files & {str(parent) for parent in PurePosixPath(path).parents}:
                raise refuse(folder, f"{folder_file.pop()} is a file and a folder", "unsafe")
        for path, target in manifest.links.items():
            self._check_link(path, target)

    def _check_link(self, path: str, target: str) -> None:
        """A link of a results folder leads into `runs/` next to it, to something in this pack."""
        contents = [*self.manifest.files, *self.manifest.shards]
        if not target.startswith(f"{PurePosixPath(path).parent}/runs/"):
            raise refuse(self.folder, f"the link {path} leads to {target}", "unsafe")
        if not any(name == target or name.startswith(f"{target}/") for name in contents):
            raise refuse(self.folder, f"the link {path} leads to {target}, which is missing")
        for name in (*contents, *self.manifest.links):
            if name.startswith(f"{path}/") or (name == path and name in contents):
                raise refuse(self.folder, f"{name} lies behind the link {path}", "unsafe")

    def verify(self) -> None:
        """Check the size and the sha256 of every part and of every file, and write nothing."""
        for mosaic in self.manifest.mosaics:
            self._check_part(mosaic)
        self.extract(lambda path: None)

    def _check_part(self, part: PartEntry) -> Path:
        path = self.folder / part.file
        if path.is_symlink() or not path.is_file():
            raise refuse(self.folder, f"{part.file} is missing")
        if path.stat().st_size != part.size or sha256_file(path) != part.sha256:
            raise refuse(self.folder, f"{part.file} is damaged: its sha256 is not the recorded one")
        return path

    def _blocks(self) -> Iterator[bytes]:
        """The decompressed stream in blocks of at most BLOCK bytes."""
        unpacker = zlib.decompressobj()
        try:
            for part in self.manifest.parts:
                data = self._check_part(part).read_bytes()
                while data:
                    yield unpacker.decompress(data, BLOCK)
                    data = unpacker.unconsumed_tail
            yield unpacker.flush()
        except zlib.error as error:
            raise refuse(self.folder, f"the parts are damaged ({error})") from None
        if self.manifest.parts and not unpacker.eof:
            raise refuse(self.folder, "the parts end too early")

    def extract(self, place: Callable[[str], Path | None]) -> None:
        """Write the content of each file to `place(path)`; None: only check it. Every hash is
        checked; what was written counts only if no error follows."""
        blocks, rest = self._blocks(), b""
        for path in sorted(self.manifest.files):
            entry, digest, target = self.manifest.files[path], hashlib.sha256(), place(path)
            if target is not None:
                target.parent.mkdir(parents=True, exist_ok=True)
            left = entry.size
            with nullcontext() if target is None else open(target, "wb") as file:
                while left:
                    if not rest and (rest := next(blocks, None)) is None:
                        raise refuse(self.folder, f"ends inside {path}")
                    piece, rest = rest[:left], rest[left:]
                    digest.update(piece)
                    left -= len(piece)
                    if file is not None:
                        file.write(piece)
            if digest.hexdigest() != entry.sha256:
                raise refuse(self.folder, f"{path} is damaged: its sha256 is not the recorded one")
        if rest or any(blocks):
            raise refuse(self.folder, "contains more than its manifest lists")


def check_name(folder: Path, path: str) -> None:
    """Raise a `UserError` (code "unsafe") unless a path is one of results: a file in one of FOLDERS
    or one of FILES."""
    top, *below = parts = path.split("/")
    known = top in FOLDERS if below else top in FILES
    if not known or not all(NAME.fullmatch(part) for part in parts):
        raise refuse(folder, f"the path {path!r} is not allowed", "unsafe")
