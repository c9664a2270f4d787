"""An exported folder on its way to the Hugging Face hub; nothing is sent unless asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from fedllm.errors import RunError


class Hub(Protocol):
    """What is used of `huggingface_hub.HfApi`."""

    def whoami(self) -> Any:
        """Tell whose token is used."""

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> Any:
        """Make a repository."""

    def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> Any:
        """Upload all files of a folder in one commit."""


def check_push(repo_id: str, hub: Hub) -> None:
    """Make sure, before anything is loaded, that a push can succeed.

    Raises:
        RunError: If the name is no repository's, or there is no valid login.
    """
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # lazily

    with _told(repo_id):
        validate_repo_id(repo_id)
        hub.whoami()


def push(folder: Path, repo_id: str, *, is_private: bool, hub: Hub) -> None:
    """Upload a folder as one commit; the repository is made if it is not there.

    Raises:
        RunError: If the hub refuses; the folder stays.
    """
    with _told(repo_id, f" The export itself is in {folder}."):
        hub.create_repo(repo_id, private=is_private, exist_ok=True)
        hub.upload_folder(
            repo_id=repo_id, folder_path=str(folder), commit_message="Export from fedllm"
        )


def own_hub() -> Hub:
    """Return the hub with the login of this machine."""
    from huggingface_hub import HfApi

    hub: Hub = HfApi()
    return hub


@contextmanager
def _told(repo_id: str, rest: str = "") -> Iterator[None]:
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    try:
        yield
    except HFValidationError:
        raise RunError(
            f"--push {repo_id}: that is no repository's name; give NAME or OWNER/NAME.{rest}"
        ) from None
    except LocalTokenNotFoundError:
        raise RunError(f"--push needs a login at the hub: run `hf auth login`.{rest}") from None
    except HfHubHTTPError as error:
        text = " ".join(str(error).split())[:300]
        raise RunError(
            f"The hub refuses to take {repo_id}: {text}. Check the name, and that your token may"
            f" write (`hf auth whoami`).{rest}"
        ) from None
    except OSError as error:
        raise RunError(
            f"The hub cannot be reached to push {repo_id}: {error}. Go online.{rest}"
        ) from None
