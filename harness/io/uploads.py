"""Uploads to repositories of the Hugging Face hub."""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from harness.errors import UserError
from harness.io.hub import is_id

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Destination:
    """Where a folder is uploaded to. revision: the branch; default: main. message: of the commit.
    private: whether a new repository is private; None: the owner's default."""

    repository: str
    private: bool | None = None
    revision: str | None = None
    message: str | None = None


REASONS = {
    401: "the token is not valid; log in again with `hf auth login`",
    403: "the token has no permission to write there; use one with write access",
    404: "no such repository, or the token may not see it",
    429: "too many requests; wait a while and repeat the command",
}


@contextlib.contextmanager
def _one_line(action: str) -> Iterator[None]:
    """Turn errors of the client, and of the libraries behind it, into a `UserError`."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        yield
    except UserError:
        raise
    except OfflineModeIsEnabled:
        raise UserError(f"could not {action}: HF_HUB_OFFLINE is set; unset it", "offline") from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        text = error.server_message or str(error)
        reason = REASONS.get(status, f"the hub answered {status} ({_line(text)})")
        raise UserError(f"could not {action} (Hugging Face): {reason}", "upload") from None
    except Exception as error:
        message = f"could not {action} (Hugging Face): {_line(str(error)) or type(error).__name__}"
        raise UserError(f"{message}; repeat the command to continue", "upload") from None


def _line(text: str) -> str:
    return " ".join(text.split())[:200]


def check_destination(destination: Destination) -> None:
    """Check the name of a repository, the login and the connection, which is cheap, before the work
    whose result will be uploaded. Raises a `UserError`."""
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    repository, expected = destination.repository, "expected owner/name"
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        expected = _line(str(error))
        raise UserError(f"repository {repository!r}: {expected}", "invalid-value") from None
    if not is_id(repository):
        raise UserError(f"repository {repository!r}: {expected}", "invalid-value")
    action = f"upload to {repository}"
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"could not {action}: HF_HUB_OFFLINE is set; unset it", "offline")
    if get_token() is None:
        remedy = "log in with `hf auth login`, or set HF_TOKEN"
        raise UserError(f"could not {action} (Hugging Face): {remedy}", "not-logged-in")
    with _one_line(action):
        HfApi().whoami()


def upload_folder(folder: Path, destination: Destination) -> str:
    """Upload the files of a folder in one commit, to a repository that is made if it does not
    exist; return its address. Unchanged files are not sent again, others of the repository stay.
    Raises a `UserError`."""
    from huggingface_hub import HfApi

    api, repository = HfApi(), destination.repository
    with _one_line(f"upload to {repository}"):
        address = api.create_repo(repository, private=destination.private, exist_ok=True)
        if destination.private and not api.model_info(repository).private:
            remedy = "change that in its settings, or leave out --private"
            raise UserError(f"{repository} exists already and is public; {remedy}", "public")
        if destination.revision is not None:
            api.create_branch(repository, branch=destination.revision, exist_ok=True)
        logger.info("uploading %s to %s", folder, address)
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            revision=destination.revision,
            commit_message=destination.message or "Upload a one-step student",
        )
    return str(address)
