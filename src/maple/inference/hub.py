"""Prompts on the Hugging Face hub."""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError

from maple import files
from maple.checkpoint import read_prompts
from maple.clip.hub import is_network_error, offline_if_unreachable
from maple.errors import CheckpointError, first_line
from maple.inference.model_card import model_card

PROMPTS = "prompts.safetensors"
CARD = "README.md"
PREFIX = "hf-hub:"


def is_hub_id(name: str) -> bool:
    """Whether a name may be a repository of the hub: OWNER/NAME."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) is not None


def fetch_prompts(repository: str, **options: Any) -> Path:
    """Fetch the prompts file of a hub repository; return its path in the hub's cache.

    Args:
        options: `revision`, `token`, `cache_dir`, `force_download` and `local_files_only` of `hf_hub_download`.

    Raises:
        CheckpointError: no such repository or revision, one without prompts, or a hub that cannot be reached.
    """
    try:
        with offline_if_unreachable():
            return Path(hf_hub_download(repository, PROMPTS, **options))
    except Exception as error:
        _require_hub_error(error)
        raise CheckpointError(
            f"{repository!r} is not a run folder or prompts file here, and its {PROMPTS} cannot be fetched from the "
            f"hub: {first_line(error)}"
        ) from error


def write_card(folder: Path, repository: str | None = None) -> None:
    """Write the model card of the prompts in a folder; `repository` is their name on the hub."""
    files.write_text(folder / CARD, model_card(read_prompts(folder / PROMPTS), repository))


def push_folder(
    folder: Path,
    repository: str,
    *,
    message: str,
    branch: str | None,
    token: str | None,
    private: bool | None,
    **options: Any,
) -> str:
    """Upload a folder with prompts to the hub, as one commit with a card under its full name; return its address.

    Args:
        branch: created if there is none of this name; None: "main".
        options: of `HfApi.upload_folder`.

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
    return str(commit.commit_url)


def _require_hub_error(error: Exception) -> None:
    """Raise again what comes neither from the hub nor from the network."""
    if not isinstance(error, HfHubHTTPError | OSError | ValueError) and not is_network_error(error):
        raise error
