"""Local files and downloads, with hash checks.

Downloads are cached in `$ONESTEP_CACHE`, by default `~/.cache/onestep-harness`. A file appears in
the cache when it is complete and its sha256 is right; a cached file needs no network.
"""

from __future__ import annotations

import logging
import os
import pickle
import re
import sys
from pathlib import Path

from harness.errors import Problem, UserError
from harness.io.artifacts import sha256_file

logger = logging.getLogger(__name__)
TIMEOUT = 60.0  # seconds without data


def is_address(source: str) -> bool:
    return re.match(r"[a-z]+://", source) is not None


def cache_dir() -> Path:
    return Path(os.environ.get("ONESTEP_CACHE") or Path.home() / ".cache" / "onestep-harness")


def source_problems(
    key: str,
    source: str,
    sha256: str | None,
    *,
    sha256_key: str | None = None,
    required: bool = True,
    folder: bool = False,
) -> list[Problem]:
    """Errors in a file or URL of an experiment.

    key, sha256_key: the keys of `source` and `sha256`; by default, `key` and `key` + "_sha256". A
    URL needs a sha256. required: a local file must exist. folder: it may be a folder.
    """
    if is_address(source):
        message = "missing; downloads are verified by their sha256"
        place = sha256_key or f"{key}_sha256"
        return [] if sha256 else [Problem(place, "missing-key", message)]
    path = Path(source).expanduser()
    if not path.exists():
        return [Problem(key, "missing-file", f"{source} does not exist")] if required else []
    if path.is_dir() and not folder:
        return [Problem(key, "not-a-file", f"{source} is a folder")]
    return []


def fetch(source: str, sha256: str | None) -> Path:
    """The local path of a file or a URL. The hash is required for a URL and optional for a path."""
    if not is_address(source):
        path = Path(source).expanduser()
        if not path.is_file():
            raise UserError(f"{path} does not exist", "missing-file")
        if sha256:
            _verify(path, sha256)
        return path
    if not sha256:
        raise UserError(f"{source}: a download needs its sha256", "no-checksum")
    path = cache_dir() / f"{sha256[:16]}-{source.rsplit('/', 1)[-1]}"
    if not path.exists():
        from filelock import FileLock

        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(path.name + ".lock")):
            if not path.exists():  # another process may have downloaded it meanwhile
                _download(source, sha256, path)
    _verify(path, sha256, "; delete it and run again")
    return path


def _verify(path: Path, sha256: str, remedy: str = "") -> None:
    if (found := sha256_file(path)) != sha256:
        raise UserError(f"{path} has sha256 {found}, expected {sha256}{remedy}", "checksum")


def _download(source: str, sha256: str, path: Path) -> None:
    import http.client  # slow imports that most stages do not need
    import socket

    from torch.hub import download_url_to_file

    for partial in path.parent.glob(f"{path.name}.*.partial"):  # of a killed process
        partial.unlink()
    logger.info("downloading %s to %s", source, path)
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        download_url_to_file(source, str(path), sha256, progress=sys.stderr.isatty())
    except (OSError, http.client.HTTPException) as error:
        raise UserError(
            f"could not download {source} ({error}); run again, or put the file with sha256 "
            f"{sha256} at {path}, or give a local path instead of the URL",
            "download",
        ) from None
    except RuntimeError as error:  # of torch.hub: another hash
        raise UserError(
            f"{source}: the download is incomplete or another file ({error})", "checksum"
        ) from None
    finally:
        socket.setdefaulttimeout(timeout)


def load_pickled(file):
    """Tensors in plain containers from a file in torch's format (a path or a stream).

    Anything else in the file raises an `UnpicklingError` of one line and is not executed; torch's
    own message would explain how to execute it.
    """
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
