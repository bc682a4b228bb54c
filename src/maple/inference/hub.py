"""Prompts on the Hugging Face hub."""

import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

from huggingface_hub import HfApi, ModelCard, ModelHubMixin, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError

from maple import files
from maple.checkpoint import read_prompts
from maple.clip.hub import is_network_error, offline_if_unreachable
from maple.errors import CheckpointError, first_line
from maple.inference.card import model_card

PROMPTS = "prompts.safetensors"
CARD = "README.md"
PREFIX = "hf-hub:"


def is_hub_id(name: str) -> bool:
    """Whether a name may be a repository of the hub: OWNER/NAME."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) is not None


def fetch_prompts(repository: str, **options: Any) -> Path:
    """Fetch the prompts file of a hub repository; return its path in the hub's cache.

    Args:
        options: `revision`, `token`, `cache_dir`, `force_download` and `local_files_only`, as `hf_hub_download` has
            them.

    Raises:
        CheckpointError: no such repository or revision, none with prompts, or a hub that cannot be reached.
    """
    try:
        with offline_if_unreachable():
            return Path(hf_hub_download(repository, PROMPTS, **options))
    except Exception as error:
        _reraise_foreign(error)
        raise CheckpointError(
            f"{repository!r} is no run folder and no prompts file here, and its {PROMPTS} cannot be fetched from the "
            f"hub: {first_line(error)}"
        ) from error


class OnHub(ModelHubMixin):
    """huggingface_hub's mixin over a prompts file: `save_pretrained` and `push_to_hub`, with a model card.

    The prompts file says all that the mixin would keep in a `config.json` (and would take one away, of a run's folder,
    say), so none is read or written. Who inherits gives `_save_pretrained` and `from_pretrained`.
    """

    def __new__(cls, *_: Any, **__: Any) -> Self:
        """Make a plain object: the mixin would keep the constructor's arguments in it, which scikit-learn forbids."""
        return object.__new__(cls)

    def generate_model_card(self, folder: str | Path, repo_id: str | None = None) -> ModelCard:
        """The card of the prompts that lie in a folder; `repo_id` is the name on the hub that it speaks of."""
        return ModelCard(model_card(read_prompts(Path(folder) / PROMPTS), repo_id))

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        *,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        model_card_kwargs: dict[str, Any] | None = None,
        **push_to_hub_kwargs: Any,
    ) -> Path | str:
        """Write the prompts (`prompts.safetensors`) and a model card (`README.md`) into a folder; return it.

        Args:
            repo_id: the name on the hub that the card will speak of.
            push_to_hub: upload it there too, with `push_to_hub_kwargs` as `push_to_hub` takes them; the address of the
                commit is returned instead.

        Raises:
            CheckpointError: there is a file of this name, or the upload fails.
        """
        folder = Path(save_directory)
        if folder.exists() and not folder.is_dir():
            raise CheckpointError(f"{folder} is a file; give a folder for the prompts, which need not exist")
        self._save_pretrained(folder)
        about = {"repo_id": repo_id, **(model_card_kwargs or {})}
        files.write_text(folder / CARD, str(self.generate_model_card(folder, **about)))
        if push_to_hub:
            return self.push_to_hub(repo_id or folder.resolve().name, **push_to_hub_kwargs)
        return folder

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload prompts",
        branch: str | None = None,
        token: str | None = None,
        private: bool | None = None,
        **options: Any,
    ) -> str:
        """Upload what `save_pretrained` writes to the hub, as one commit; return its address.

        Args:
            branch: made, if there is none of this name; "main" by default.
            options: `create_pr`, `allow_patterns`, `ignore_patterns`, `delete_patterns`, as the mixin has them.

        Raises:
            CheckpointError: the hub refuses, or cannot be reached.
        """
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            try:
                api = HfApi(token=token)
                name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
                if branch is not None:
                    api.create_branch(name, branch=branch, exist_ok=True)
                files.write_text(Path(folder) / CARD, str(self.generate_model_card(folder, name)))
                commit = api.upload_folder(
                    repo_id=name, folder_path=folder, commit_message=commit_message, revision=branch, **options
                )
            except Exception as error:
                _reraise_foreign(error)
                raise CheckpointError(f"nothing was pushed to {repo_id!r}: {first_line(error)}") from error
            return str(commit.commit_url)


def _reraise_foreign(error: Exception) -> None:
    """Raise again what is neither the hub's word nor the network's."""
    if not isinstance(error, HfHubHTTPError | OSError | ValueError) and not is_network_error(error):
        raise error
