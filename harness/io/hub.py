"""Repositories of the Hugging Face hub, through its cache.

A repository is named by its id, `owner/name`, and a commit: the commit identifies the content, so
what is in the cache needs no network and no other hash.
"""

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from harness.errors import Problem, UserError
from harness.io.downloads import is_address

logger = logging.getLogger(__name__)
ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
COMMIT = re.compile(r"[0-9a-f]{40}")
Kind = Literal["model", "dataset"]


def is_id(source: str) -> bool:
    """Whether a text has the form of a repository's id. A relative path may have it, too."""
    return ID.fullmatch(source) is not None


def revision_problems(key: str, source: str, revision: str | None) -> list[Problem]:
    """Errors in `<key>.source` and `<key>.revision`. Without a revision, `source` is a local path
    or an address, and not checked here."""
    if revision is None:
        return []
    if is_address(source) or not is_id(source):
        message = f"not allowed: {source!r} is not the id of a repository (owner/name)"
        return [Problem(f"{key}.revision", "not-allowed", message)]
    if not COMMIT.fullmatch(revision):
        message = f"expected a commit hash (40 hexadecimal digits), not {revision!r}"
        message += "; the content of branches and tags may change"
        return [Problem(f"{key}.revision", "invalid-value", message)]
    return []


def missing_path_hint(source: str) -> str:
    """What to add to "… does not exist" where a path may be meant as the id of a repository."""
    hint = "; for a repository of the Hugging Face hub, add its commit hash as revision"
    return hint if is_id(source) else ""


def snapshot(
    repository: str, revision: str, kind: Kind = "model", patterns: Sequence[str] | None = None
) -> Path:
    """The folder of a repository at a commit. Files are downloaded unless they are in the cache.

    patterns: of the files, as in `fnmatch`; default: all. A `UserError` of one line if the
    repository or the commit does not exist, needs a login, or cannot be downloaded.
    """
    from huggingface_hub import errors, snapshot_download

    name = f"{repository} at {revision[:12]}"
    logger.info("reading the %s %s of the Hugging Face hub", kind, name)
    options = {"repo_type": kind, "revision": revision, "allow_patterns": patterns}
    try:
        return Path(snapshot_download(repository, **options))
    except errors.GatedRepoError:
        reason = "accept its terms on its page, then log in with `hf auth login`"
    except errors.RepositoryNotFoundError:
        reason = f"no such {kind}; if it is private, log in with `hf auth login`"
    except errors.RevisionNotFoundError:
        reason = "the repository has no such commit"
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        reason = "it is not in the cache, and the hub could not be reached"
    except Exception as error:  # of any of the libraries behind the client
        reason = " ".join(str(error).split())[:200] or type(error).__name__
    raise UserError(f"could not download {name} (Hugging Face): {reason}", "download")


def cached_snapshot(repository: str, revision: str, kind: Kind = "model") -> Path | None:
    """The folder of a repository at a commit in the cache, perhaps incomplete; None if there is
    none. It never uses the network, as checks and plans must not."""
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path(HF_HUB_CACHE, f"{kind}s--{repository.replace('/', '--')}", "snapshots", revision)
    return folder if folder.is_dir() else None
