"""CLIP repositories of the hub: their configuration and weights, fetched into the hub's own cache."""

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name

from maple.clip import formats
from maple.clip.transformers_format import PREPROCESSORS
from maple.errors import BackboneError, first_line

_WEIGHTS = {
    "open_clip_config.json": formats.OPEN_CLIP_WEIGHTS,
    "config.json": (
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
    ),
}
_TOKENIZER_FILES = (
    *("tokenizer_config.json", "special_tokens_map.json", "tokenizer.json", "vocab.json", "merges.txt", "vocab.txt"),
    *("spiece.model", "sentencepiece.bpe.model", "tokenizer.model"),
)


def download(repository: str) -> Path:
    """Fetch what `load_clip` reads of a hub repository; return its folder in the hub's cache.

    Without a network, what an earlier call fetched is enough.

    Raises:
        BackboneError: no such repository, none in a known format, or a hub that cannot be reached.
    """
    try:
        with asking_the_hub():
            for config, candidates in _WEIGHTS.items():
                if (found := _fetch(repository, config)) is not None:
                    _fetch_weights(repository, config, candidates)
                    _fetch_extras(repository, found)
                    return found.parent
    except Exception as error:
        if not isinstance(error, HfHubHTTPError | OSError | ValueError) and not is_network_error(error):
            raise
        raise BackboneError(
            f"{repository!r} is no folder here, and cannot be fetched from the hub: {_reason(error)} "
            "If this machine has no network, fetch the repository elsewhere and name its folder"
        ) from error
    raise BackboneError(f"{repository} is no CLIP: it has neither open_clip_config.json nor config.json")


@contextmanager
def asking_the_hub() -> Iterator[None]:
    """Ask the hub; but only its cache where its host has no address here: the client would try for a minute, aloud.

    Raises:
        OSError: then, for what is not in the cache.
    """
    host, before = _host_without_address(), constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or host is not None
    try:
        yield
    except OSError as error:
        if host is None:
            raise
        raise OSError(f"{host} has no address here (no network?), and nothing of it was fetched before.") from error
    finally:
        constants.HF_HUB_OFFLINE = before


def _host_without_address() -> str | None:
    host = urlsplit(constants.ENDPOINT).hostname
    if host is None or constants.HF_HUB_OFFLINE or getproxies():
        return None
    try:
        socket.getaddrinfo(host, None)
    except socket.gaierror:
        return host
    return None


def _reason(error: Exception) -> str:
    if isinstance(error, GatedRepoError):
        return "it is gated; ask its owners for access and log in."
    if isinstance(error, RepositoryNotFoundError):
        return "it has no such public repository."
    return first_line(error)


def is_network_error(error: Exception) -> bool:
    """Whether `error` is one of the HTTP libraries', which share no base class across the hub's versions."""
    modules = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    return bool(modules & {"httpx", "httpx2", "httpcore", "requests", "urllib3"})


def _fetch(repository: str, file: str) -> Path | None:
    """The cached path of a file, None if the repository has no such file."""
    try:
        return Path(hf_hub_download(repository, file))
    except LocalEntryNotFoundError:
        if _known_absent(repository, file):
            return None
        raise
    except EntryNotFoundError:
        return None


def _known_absent(repository: str, file: str) -> bool:
    """Whether the hub, when it last could be asked, had no such file: it leaves an empty one under `.no_exist`."""
    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repository, repo_type="model")
    reference = folder / "refs" / "main"
    return reference.is_file() and (folder / ".no_exist" / reference.read_text().strip() / file).is_file()


def _fetch_weights(repository: str, config: str, candidates: tuple[str, ...]) -> None:
    for candidate in candidates:
        if (weights := _fetch(repository, candidate)) is None:
            continue
        if weights.suffix == ".json":
            for shard in formats.shards(weights):
                _fetch(repository, shard)
        return
    raise BackboneError(f"{repository} has a {config} but none of {', '.join(candidates)}")


def _fetch_extras(repository: str, config: Path) -> None:
    if config.name == "config.json":
        for file in PREPROCESSORS:
            _fetch(repository, file)
        return
    described = json.loads(config.read_text(encoding="utf-8"))
    if described.get("model_cfg", {}).get("text_cfg", {}).get("hf_tokenizer_name"):
        for file in _TOKENIZER_FILES:
            _fetch(repository, file)
