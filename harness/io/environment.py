"""What the system sets for a process: processes of torchrun, encodings, caches, the home folder."""

import contextlib
import logging
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

logger = logging.getLogger(__name__)

# Set by torchrun for its processes, and by some platforms for containers without torchrun.
RANKS = ("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
ADDRESS = ("MASTER_ADDR", "MASTER_PORT")
OPTIONS = "PET_"  # prefix of variables that replace torchrun's options


def launched() -> bool:
    """Whether torchrun started this process. Without it, RANK, WORLD_SIZE and similar variables of
    a platform do not count."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def is_first() -> bool:
    """Whether this process is the only one of its stage, or rank 0 under torchrun."""
    return not launched() or os.environ.get("RANK", "0") == "0"


def for_torchrun(variables: Mapping[str, str]) -> dict[str, str]:
    """The variables without what a platform sets for a torchrun of its own, over several hosts."""
    ours = (name for name in variables if name not in (*RANKS, *ADDRESS))
    return {name: variables[name] for name in ours if not name.startswith(OPTIONS)}


def joined_path(folder: str) -> str:
    """PYTHONPATH with `folder` first."""
    return os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))


def prepare() -> None:
    """Make a process independent of its platform: output in any encoding, figures without the
    backend of a notebook, and a folder for caches where the user has no home."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # replaced by a program
            stream.reconfigure(errors="replace")  # ASCII has no arrows
    os.environ["MPLBACKEND"] = "agg"  # of a notebook: a module that may not be installed here
    try:
        Path.home()
    except RuntimeError:
        os.environ["HOME"] = str(_temporary_home())
        os.environ.setdefault("USER", f"uid-{os.getuid()}")
        message = "this user has no home folder; caches are in %s; set HOME or ONESTEP_CACHE"
        logger.warning(message, os.environ["HOME"])


def _temporary_home() -> Path:
    """A folder that belongs to this user alone, the same for all its processes if possible."""
    folder = Path(tempfile.gettempdir()) / f"onestep-harness-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    facts = folder.lstat()
    private = facts.st_uid == os.getuid() and facts.st_mode & 0o777 == 0o700
    if folder.is_symlink() or not private:
        return Path(tempfile.mkdtemp(prefix=folder.name))
    return folder
