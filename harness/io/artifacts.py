"""Atomic files, hashes, JSON and safetensors.

A file is either complete or absent: it is written under a temporary name and renamed. Stages
exchange data through this module; nothing here unpickles.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from harness.errors import UserError, file_system_error

UNITS = {"kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def canonical(value) -> str:
    """JSON text with sorted keys: equal values have equal texts."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def digest(value) -> str:
    """Hash of a JSON value: 16 hex digits."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:16]


def damaged(path: Path, reason: str, owner: Path | None = None) -> UserError:
    """The error for an unreadable file. `owner`: what to delete, if the project can rewrite it."""
    remedy = f"; delete {owner} and run the same command again" if owner else ""
    return UserError(f"{path} is damaged or was replaced ({reason}){remedy}", "damaged")


@contextlib.contextmanager
def _reading(path: Path, owner: Path | None = None, errors: type | tuple = ()) -> Iterator[None]:
    """Turn a missing file and these errors of reading it into a `UserError`."""
    try:
        yield
    except FileNotFoundError:
        message = f"{path} does not exist; run the workflow, or the stage that writes it"
        raise UserError(message, "missing-file") from None
    except errors as error:
        if file_system_error(error) is not None:  # the file itself may be right
            raise
        raise damaged(path, str(error), owner) from None


def reject_lfs_pointer(path: Path) -> None:
    """Raise an error for a pointer of Git LFS: a text of three lines in place of a file that was
    not downloaded."""
    if path.is_file() and path.stat().st_size < 1024 and path.read_bytes().startswith(LFS_POINTER):
        message = "is a pointer of Git LFS, not the file; run git lfs pull in its repository"
        raise UserError(f"{path} {message}, or download the file", "lfs-pointer")


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, without its byte-order mark. Other encodings are errors, as are
    null characters (UTF-16 without a mark) and marks inside the text (of joined files)."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        reason = f"{error.reason} at byte {error.start}"
    else:
        marks = {"\0": "a null character", "\ufeff": "a byte-order mark"}
        found = next((mark for mark in marks if mark in text), None)
        if found is None:
            return text
        line = text[: text.index(found)].count("\n") + 1
        reason = f"{marks[found]} in line {line}"
    raise UserError(f"{path} is not UTF-8 text ({reason}); save it as UTF-8", "encoding")


def sha256_file(path: Path) -> str:
    with _reading(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Name the file in an error of the file system that names none, such as a full disk's."""
    try:
        yield
    except Exception as error:
        found = file_system_error(error)
        if found is None or getattr(error, "filename", None) is not None:
            raise
        raise OSError(found.errno, found.strerror, str(path)) from error


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path; the file or link made there replaces `path` if the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        with _writing(path):
            yield temporary
            if not temporary.is_symlink():
                with open(temporary, "rb") as file:
                    os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder, which replaces `folder` if the block succeeds."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)  # with the mode of the umask, and the parent's group if setgid
    try:
        with _writing(folder):
            yield temporary
            if folder.exists():
                shutil.rmtree(folder)
            os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path, owner: Path | None = None):
    """The value in a JSON file; `owner` as in `damaged`."""
    with _reading(path, owner, ValueError):  # not JSON, or not UTF-8
        return json.loads(path.read_text(encoding="utf-8-sig"))


def size_text(size: float) -> str:
    """A number of bytes to three significant digits, such as "223 MB"."""
    unit = next((unit for unit in ("TB", "GB", "MB") if size >= 0.9995 * UNITS[unit]), "kB")
    return f"{size / UNITS[unit]:.3g} {unit}"


def save_tensors(path: Path, tensors: dict) -> str:
    """Write safetensors atomically; returns the file's sha256."""
    from safetensors.torch import save_file

    with atomic_path(path) as temporary:
        save_file({k: v.detach().contiguous() for k, v in tensors.items()}, temporary)
        return sha256_file(temporary)


def verify(path: Path, sha256: str, owner: Path | None = None) -> None:
    """Check that a file exists and has this hash; `owner` as in `damaged`."""
    if sha256_file(path) != sha256:
        raise damaged(path, "its sha256 differs from the recorded one", owner)


def load_tensors(path: Path, sha256: str | None = None, device="cpu", owner=None) -> dict:
    """Read a safetensors file, after checking its hash if one is given; `owner` as in `damaged`."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    reject_lfs_pointer(Path(path))
    if sha256 is not None:
        verify(path, sha256, owner)
    with _reading(path, owner, (SafetensorError, OSError)):
        return load_file(path, device=device)


def link(path: Path, target: Path) -> None:
    """Make `path` a relative symbolic link to `target`, replacing an existing one atomically."""
    with atomic_path(path) as temporary:
        temporary.symlink_to(os.path.relpath(target, path.parent))
