"""Files from elsewhere: local paths as they are, addresses through a cache that checks hashes.

A download is resumable and becomes visible only when it is whole and its sha256 is right; with a
warm cache no network is needed. The cache is `$ONESTEP_CACHE`, else `~/.cache/onestep-harness`.
"""

from __future__ import annotations

import os
import pickle
import re
import sys
from pathlib import Path

from harness.errors import Problem, UserError
from harness.io.artifacts import sha256_file

CHUNK = 1 << 20


def is_address(source: str) -> bool:
    return re.match(r"[a-z]+://", source) is not None


def cache_dir() -> Path:
    return Path(os.environ.get("ONESTEP_CACHE") or Path.home() / ".cache" / "onestep-harness")


def fetch(source: str, sha256: str | None) -> Path:
    """The local file of `source`: a path, whose hash is checked if one is given, or an address,
    which needs one."""
    if not is_address(source):
        path = Path(source).expanduser()
        if not path.is_file():
            raise UserError(f"{path} does not exist")
        if sha256 and (found := sha256_file(path)) != sha256:
            raise UserError(f"{path} has sha256 {found}, not {sha256}")
        return path
    if not sha256:
        raise UserError(f"{source}: a download needs its sha256")
    path = cache_dir() / f"{sha256[:16]}-{source.rsplit('/', 1)[-1]}"
    if not path.exists():
        from filelock import FileLock

        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(path.name + ".lock")):
            if not path.exists():  # another process may have been quicker
                _download(source, sha256, path)
    if (found := sha256_file(path)) != sha256:
        raise UserError(f"{path} has sha256 {found}, not {sha256}; delete it and run again")
    return path


def load_pickled(file):
    """What a file in torch's own format (a path or a stream) holds: tensors in plain containers.

    A file that asks for anything else runs nothing and is an `UnpicklingError` that names it, in
    one line: torch's own message tells how to load it nevertheless.
    """
    import torch

    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error)
        if asked := re.search(r"GLOBAL ([\w.]+)", reason):
            reason = f"it asks for {asked[1]}, which weights do not need"
        elif "weights_only" in reason or not reason:
            reason = "it is damaged or holds other things than weights"
        raise pickle.UnpicklingError(reason.splitlines()[0]) from None


def _download(source: str, sha256: str, path: Path) -> None:
    import http.client  # only here: a stage that downloads nothing starts sooner
    import urllib.error
    import urllib.request

    part = path.with_name(path.name + ".part")
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(source, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            resumed = have > 0 and getattr(reply, "status", None) == 206
            have = have if resumed else 0
            total = have + int(reply.headers.get("Content-Length") or 0)
            print(f"downloading {source} ({total / 1e6:.0f} MB) to {path}", file=sys.stderr)
            with open(part, "ab" if resumed else "wb") as file:
                while chunk := reply.read(CHUNK):
                    file.write(chunk)
        if part.stat().st_size < total:
            raise ConnectionError(f"broke off after {part.stat().st_size} of {total} bytes")
    except urllib.error.HTTPError as error:
        if error.code != 416:  # 416: the part is as long as the file, or longer
            raise _unreachable(source, sha256, path, f"{error.code} {error.reason}") from None
    except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
        raise _unreachable(source, sha256, path, getattr(error, "reason", error)) from None
    found = sha256_file(part)
    if found != sha256:
        size = part.stat().st_size
        part.unlink()
        raise UserError(f"{source} gave {size} bytes of sha256 {found}, not {sha256}")
    os.replace(part, path)


def _unreachable(source: str, sha256: str, path: Path, reason) -> UserError:
    return UserError(
        f"{source} cannot be downloaded ({reason}); run again to go on, or get the file of sha256 "
        f"{sha256} elsewhere and put it at {path}, or name it as a local file"
    )


def source_problems(
    key: str,
    source: str,
    sha256: str | None,
    *,
    sha256_key: str | None = None,
    required: bool = True,
    folder: bool = False,
) -> list[Problem]:
    """Errors of a file or URL that an experiment names under `key`.

    A URL needs a sha256, under `sha256_key` (default: `key` + "_sha256"). `required`: a local file
    must exist. `folder`: it may be a folder.
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
