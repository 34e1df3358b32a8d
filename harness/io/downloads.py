"""Local files and downloads, with hash checks.

Downloads are cached in `$ONESTEP_CACHE`, by default `~/.cache/onestep-harness`. A file appears in
the cache when it is complete and its sha256 is right; a cached file needs no network.
"""

import contextlib
import errno
import logging
import os
import pickle
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from harness.errors import Problem, UserError, file_system_error
from harness.io.artifacts import reject_lfs_pointer, sha256_file
from harness.io.locks import MODE

logger = logging.getLogger(__name__)


def is_address(source: str) -> bool:
    return re.match(r"[a-z]+://", source) is not None


def cache_dir() -> Path:
    if folder := os.environ.get("ONESTEP_CACHE"):
        return expand(folder)
    try:
        return Path.home() / ".cache" / "onestep-harness"
    except RuntimeError:
        message = "this user has no home folder; set ONESTEP_CACHE to a folder for downloads"
        raise UserError(message, "no-home") from None


def expand(path: str | Path) -> Path:
    """A path with `~` replaced by a home folder; a `UserError` for `~name` of an unknown user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        message = f"{path}: there is no user {Path(path).parts[0][1:]!r}; write the folder in full"
        raise UserError(message, "unknown-user") from None


def source_problems(
    key: str, source: str, sha256: str | None, *, sha256_key="", required=True, folder=False
) -> list[Problem]:
    """Errors in a file or URL of an experiment. sha256_key: by default, `key` + "_sha256".
    required: a local file must exist. folder: it may be a folder."""
    if is_address(source):
        if not sha256:
            message = "missing; downloads are verified by their sha256"
            return [Problem(sha256_key or f"{key}_sha256", "missing-key", message)]
        return []
    try:
        path = expand(source)
    except UserError as error:
        return [Problem(key, error.code, str(error))]
    if not path.exists():
        return [Problem(key, "missing-file", f"{source} does not exist")] if required else []
    elif path.is_dir() and not folder:
        return [Problem(key, "not-a-file", f"{source} is a folder")]
    return []


def fetch(source: str, sha256: str | None) -> Path:
    """The local path of a file or a URL. The hash is required for a URL and optional for a path."""
    path, remedy = expand(source), ""
    if is_address(source):
        if not sha256:
            raise UserError(f"{source}: a download needs its sha256", "no-checksum")
        path = cache_dir() / f"{sha256[:16]}-{source.rsplit('/', 1)[-1]}"
        remedy = "; delete it and run again"
        if not path.exists():
            with _cache_lock(path):
                if not path.exists():  # another process may have downloaded it meanwhile
                    _download(source, sha256, path)
    elif not path.is_file():
        raise UserError(f"{path} does not exist", "missing-file")
    reject_lfs_pointer(path)
    if sha256 and (found := sha256_file(path)) != sha256:
        raise UserError(f"{path} has sha256 {found}, expected {sha256}{remedy}", "checksum")
    return path


@contextlib.contextmanager
def _cache_lock(path: Path) -> Iterator[None]:
    """Allow one process at a time to download a file of the cache, which users may share."""
    from filelock import FileLock

    lock = path.with_name(path.name + ".lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(lock, mode=MODE).acquire()
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        place = next(place for place in (lock, *path.parents) if place.exists())
        message = f"{place} belongs to {_owner(place)} and cannot be written; set ONESTEP_CACHE to"
        message += f" a folder of your own, obtain write access, or put the file at {path}"
        raise UserError(message, "cache-access") from None
    with held:
        yield


def _owner(path: Path) -> str:
    import pwd

    number = path.stat().st_uid
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return f"user {number}"


def _download(source: str, sha256: str, path: Path) -> None:
    """Download a file, or the rest of it after an interruption."""
    import http.client  # slow imports that most stages do not need
    import urllib.error
    import urllib.request

    from tqdm import tqdm

    partial = path.with_name(path.name + ".partial")
    request = urllib.request.Request(source, headers={"User-Agent": "onestep-harness"})
    if partial.exists():
        request.add_header("Range", f"bytes={partial.stat().st_size}-")
    logger.info("downloading %s to %s", source, path)
    try:
        with urllib.request.urlopen(request, timeout=60.0) as reply:  # seconds without data
            total = int(reply.headers.get("Content-Length") or 0)
            mode = "ab" if reply.status == 206 else "wb"  # 206: the server sends the rest only
            progress = tqdm.wrapattr(reply, "read", total=total, disable=None)
            with open(partial, mode) as file, progress as stream:
                shutil.copyfileobj(stream, file)
            if missing := getattr(reply, "length", 0):
                raise ConnectionError(f"{missing} bytes are missing")
    except (OSError, http.client.HTTPException) as error:
        refused = isinstance(error, urllib.error.URLError)  # "Permission denied" of a connection
        if not refused and file_system_error(error) is not None:  # a full disk, for example
            raise
        if getattr(error, "code", None) == 416:  # the partial file is not shorter than the file
            partial.unlink(missing_ok=True)
        message = f"could not download {source} ({error}); run again to continue, or put the file"
        message += f" with sha256 {sha256} at {path}, or give a local path instead of the URL"
        raise UserError(message, "download") from None
    if (found := sha256_file(partial)) != sha256:
        partial.unlink()
        raise UserError(f"{source} has sha256 {found}, expected {sha256}", "checksum")
    partial.replace(path)


def load_pickled(file):
    """Tensors in plain containers from a file in torch's format (a path or a stream). Other content
    is not executed, but raises an `UnpicklingError` of one line; torch's would explain how to."""
    import torch

    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error)
        if name := re.search(r"GLOBAL ([\w.]+)", reason):
            reason = f"it contains {name[1]}, which is not a tensor"
        elif "weights_only" in reason or not reason:
            reason = "it is damaged or contains other objects than tensors"
        raise pickle.UnpicklingError(reason.splitlines()[0]) from None
