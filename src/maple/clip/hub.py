"""Download CLIP repositories from the Hugging Face hub into its own cache."""

from pathlib import Path
from typing import Any

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name

from maple.clip.checkpoints import formats
from maple.clip.checkpoints.transformers_format import PREPROCESSORS, transformers_model_type
from maple.errors import BackboneDownloadError, BackboneError, first_line
from maple.files import read_json
from maple.hub_client import is_network_error, offline_if_unreachable

TEXT_FOLDER = "text_encoder"
"""The folder, next to open_clip_config.json, of a config.json that is taken in place of that of the hub."""

_INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_WEIGHTS = {
    "open_clip_config.json": (*formats.OPEN_CLIP_WEIGHTS, *_INDICES),
    "config.json": (
        "model.safetensors",
        _INDICES[0],
        "pytorch_model.bin",
        _INDICES[1],
    ),
}
_TOKENIZER_FILES = (
    *("tokenizer_config.json", "special_tokens_map.json", "tokenizer.json", "vocab.json", "merges.txt", "vocab.txt"),
    *("spiece.model", "sentencepiece.bpe.model", "tokenizer.model"),
)


def download(repository: str, *, weights: bool = True) -> Path:
    """Download the files of a hub repository that `load_clip` reads; return their folder in the hub's cache.

    Without a network, the files of an earlier call are enough. Without `weights`, only descriptions are downloaded.

    Raises:
        BackboneError: there is no such repository, it is not in a known format, or the hub cannot be reached.
    """
    try:
        with offline_if_unreachable():
            for config, candidates in _WEIGHTS.items():
                if (path := _fetch(repository, config)) is None:
                    continue
                # What is described is checked before the weights, which may be large, are downloaded.
                extras: tuple[str, ...] = ()
                if config == "config.json":
                    described: dict[str, Any] = read_json(path, error=BackboneError, foreign=True)
                    model_type = transformers_model_type(described, path)
                    extras = (*PREPROCESSORS, *(_TOKENIZER_FILES if model_type != "clip" else ()))
                else:
                    text = formats.read_open_clip_config(path)[0]["text_cfg"]
                    if text.get("hf_tokenizer_name"):
                        extras = _TOKENIZER_FILES
                    text_name = text.get("hf_model_name")
                    if text_name and _fetch(repository, f"{TEXT_FOLDER}/config.json") is None:
                        fetch_text_config(text_name)
                if not weights:
                    return path.parent
                file = next(filter(None, (_fetch(repository, candidate) for candidate in candidates)), None)
                if file is None:
                    raise BackboneError(f"{repository} has a {config} but none of {', '.join(candidates)}")
                if config == "open_clip_config.json" and file.name in _WEIGHTS["config.json"]:
                    # Perhaps in the layout of transformers, whose description is then needed.
                    extras = (*extras, "config.json", *PREPROCESSORS)
                if file.suffix == ".json":
                    extras = (*extras, *formats.shards(file))
                for name in extras:
                    _fetch(repository, name)
                return path.parent
    except Exception as error:
        if not isinstance(error, HfHubHTTPError | OSError | ValueError) and not is_network_error(error):
            raise
        if isinstance(error, GatedRepoError):
            reason = "it is gated; ask its owners for access and log in."
        elif isinstance(error, RepositoryNotFoundError):
            reason = "it has no such public repository."
        else:
            reason = first_line(error)
        raise BackboneDownloadError(
            f"{repository!r} is not a folder here, and cannot be downloaded from the hub: {reason} "
            "If this machine has no network, download the repository elsewhere and give its folder"
        ) from error
    raise BackboneError(f"{repository} is not a CLIP: it has neither open_clip_config.json nor config.json")


def fetch_text_config(name: str) -> Path:
    """Fetch the config.json of a model of the hub, and no other file of it; return its path in the hub's cache.

    Raises:
        BackboneDownloadError: there is none, or the hub cannot be reached.
    """
    try:
        with offline_if_unreachable():
            path = _fetch(name, "config.json")
    except Exception as error:
        if not isinstance(error, HfHubHTTPError | OSError | ValueError) and not is_network_error(error):
            raise
        raise BackboneDownloadError(
            f"the configuration of the text tower {name} cannot be downloaded: {first_line(error)} If this machine has "
            f"no network, put its config.json into the folder {TEXT_FOLDER} next to open_clip_config.json"
        ) from error
    if path is None:
        raise BackboneDownloadError(f"the text tower {name} has no config.json in its repository")
    return path


def _fetch(repository: str, file: str) -> Path | None:
    """The path of a file in the cache, None if the repository has no such file."""
    try:
        return Path(hf_hub_download(repository, file))
    except LocalEntryNotFoundError:
        # If the hub had no such file when it was last reached, its client has left one under `.no_exist`. Where other
        # programs have fetched what they need, with the weights, that is all there is.
        folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repository, repo_type="model")
        reference = folder / "refs" / "main"
        if not reference.is_file():
            raise
        revision = reference.read_text().strip()
        weights = (folder / "snapshots" / revision / name for names in _WEIGHTS.values() for name in names)
        if (folder / ".no_exist" / revision / file).is_file() or any(path.is_file() for path in weights):
            return None
        raise
    except EntryNotFoundError:
        return None
