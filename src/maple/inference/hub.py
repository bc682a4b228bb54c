"""Prompts on the Hugging Face hub."""

import re
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError

from maple.clip.hub import is_network_error
from maple.errors import CheckpointError, first_line

PROMPTS = "prompts.safetensors"
CARD = "README.md"
PREFIX = "hf-hub:"


def is_hub_id(name: str) -> bool:
    """Whether a name may be a repository of the hub: OWNER/NAME."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) is not None


def fetch_prompts(repository: str, *, revision: str | None = None, token: str | None = None) -> Path:
    """Fetch the prompts file of a hub repository; return its path in the hub's cache.

    Raises:
        CheckpointError: no such repository or revision, none with prompts, or a hub that cannot be reached.
    """
    try:
        return Path(hf_hub_download(repository, PROMPTS, revision=revision, token=token))
    except Exception as error:
        _reraise_foreign(error)
        raise CheckpointError(
            f"{repository!r} is no run folder and no prompts file here, and its {PROMPTS} cannot be fetched from the "
            f"hub: {first_line(error)}"
        ) from error


def push_folder(
    folder: Path,
    repository: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    message: str = "Upload prompts",
) -> str:
    """Upload a folder's files to a repository, which is made if need be; return the address of the commit.

    Raises:
        CheckpointError: the hub refuses, or cannot be reached.
    """
    try:
        api = HfApi(token=token)
        name = api.create_repo(repository, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(name, branch=revision, exist_ok=True)
        commit = api.upload_folder(repo_id=name, folder_path=folder, commit_message=message, revision=revision)
    except Exception as error:
        _reraise_foreign(error)
        raise CheckpointError(f"nothing was pushed to {repository!r}: {first_line(error)}") from error
    return str(commit.commit_url)


def _reraise_foreign(error: Exception) -> None:
    """Raise again what is neither the hub's word nor the network's."""
    if not isinstance(error, HfHubHTTPError | OSError | ValueError) and not is_network_error(error):
        raise error
