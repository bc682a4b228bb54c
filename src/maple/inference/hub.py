"""Prompts on the Hugging Face hub."""

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError

from maple.checkpoint import read_prompts
from maple.errors import CheckpointError, first_line
from maple.hub_client import is_network_error, offline_if_unreachable
from maple.inference.sharing import PROMPTS, write_card
from maple.plugins import code_files, code_of


def fetch_prompts(repository: str, **options: Any) -> Path:
    """Fetch the prompts file of a hub repository, with `options` of `hf_hub_download`; return its path in the cache.

    The file of a method from outside the package is fetched, too; nothing in it is run.

    Raises:
        CheckpointError: no such repository or revision, one without prompts, or a hub that cannot be reached.
    """
    try:
        with offline_if_unreachable():
            path = Path(hf_hub_download(repository, PROMPTS, **options))
            for name, file in code_files(read_prompts(path).method).items():
                if code_of(name) is None:
                    hf_hub_download(repository, file, **options)
            return path
    except Exception as error:
        _require_hub_error(error)
        raise CheckpointError(
            f"{repository!r} is not a run folder or prompts file here, and its {PROMPTS} cannot be fetched from the "
            f"hub: {first_line(error)}"
        ) from error


def push_folder(
    folder: Path,
    repository: str,
    *,
    message: str,
    branch: str | None,
    token: str | None,
    private: bool | None,
    **options: Any,
) -> tuple[str, str]:
    """Upload a folder with prompts to the hub, as one commit with a card under its full name.

    Returns the address of the commit, and that name.

    A `branch` of a new name is created; None: "main". `options` are those of `HfApi.upload_folder`.

    Raises:
        CheckpointError: the hub refuses, or cannot be reached.
    """
    try:
        api = HfApi(token=token)
        # The hub puts the user's name before a repository without one, and the card shall name it in full.
        name = api.create_repo(repository, private=private, exist_ok=True).repo_id
        if branch is not None:
            api.create_branch(name, branch=branch, exist_ok=True)
        write_card(folder, name)
        commit = api.upload_folder(repo_id=name, folder_path=folder, commit_message=message, revision=branch, **options)
    except Exception as error:
        _require_hub_error(error)
        raise CheckpointError(f"nothing was pushed to {repository!r}: {first_line(error)}") from error
    return str(commit.commit_url), str(name)


def _require_hub_error(error: Exception) -> None:
    """Raise again what comes neither from the hub nor from the network, nor was caused by these."""
    cause: BaseException | None = error
    while isinstance(cause, Exception):  # the client wraps errors of uploads in one of its own
        if isinstance(cause, HfHubHTTPError | OSError | ValueError) or is_network_error(cause):
            return
        cause = cause.__cause__
    raise error
