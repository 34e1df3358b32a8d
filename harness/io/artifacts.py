"""Files that are either whole or absent: atomic writes, hashes, locks.

Everything that one stage leaves for another goes through this module. Nothing here unpickles.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from harness.errors import UserError


def canonical(value) -> str:
    """JSON text that is equal exactly when the values are equal."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def digest(value) -> str:
    """16 hex digits naming a JSON-like value."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:16]


def settings_but(model, later: set[str], without: set[str] = frozenset()) -> dict:
    """The fields of a pydantic model, `later` ones left out where they keep their defaults: what is
    finished outlives keys that came after it."""
    early = model.model_dump(exclude={*later, *without})
    return early | model.model_dump(include=set(later), exclude_defaults=True)


def _missing(path: Path) -> UserError:
    return UserError(
        f"{path} is missing; run the workflow (or the stage that makes it), and if it is still "
        f"missing delete {path.parent} first"
    )


def sha256_file(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise _missing(path) from None


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when the block ends without error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `folder` when the block ends without error."""
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
    try:
        yield temporary
        if folder.exists():
            shutil.rmtree(folder)
        temporary.chmod(0o755)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def _damaged(path: Path, why: str, owner: Path | None) -> UserError:
    """`owner`: the folder that has to go for the file to be made again."""
    return UserError(
        f"{path} is damaged or from another run ({why}); delete {owner or path.parent} and run the "
        "same command again"
    )


def read_json(path: Path, owner: Path | None = None):
    """The value in a JSON file that a stage wrote; a missing or broken file is one clear line."""
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise _missing(path) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise _damaged(path, str(error), owner) from None


def save_tensors(path: Path, tensors: dict, metadata: dict[str, str] | None = None) -> str:
    """Write safetensors atomically; returns the file's sha256."""
    from safetensors.torch import save_file

    with atomic_path(path) as temporary:
        save_file({k: v.detach().contiguous() for k, v in tensors.items()}, temporary, metadata)
        return sha256_file(temporary)


def verify(path: Path, sha256: str, owner: Path | None = None) -> None:
    """Refuse a missing file, or one of another hash, with one clear line."""
    if sha256_file(path) != sha256:
        raise _damaged(path, "its sha256 is not the recorded one", owner)


def load_tensors(
    path: Path, sha256: str | None = None, device: str = "cpu", owner: Path | None = None
) -> dict:
    """Read safetensors; a missing, truncated or foreign file is refused with one clear line, which
    says that `owner` (its folder, if not given) is to be deleted."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path)
    try:
        if sha256 is not None:
            verify(path, sha256, owner)
        return load_file(path, device=device)
    except FileNotFoundError:
        raise _missing(path) from None
    except (SafetensorError, OSError) as error:
        raise _damaged(path, str(error), owner) from None


def link(path: Path, target: Path) -> None:
    """Make `path` a relative symbolic link to `target`, replacing what is there, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(os.path.relpath(target, path.parent))
    os.replace(temporary, path)
