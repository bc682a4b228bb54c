"""CLIPs that open_clip builds: its architectures, folders, repositories and files of weights."""

import difflib
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import open_clip
import torch
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.pretrained import download_pretrained
from open_clip.transform import PreprocessCfg, merge_preprocess_dict
from torch import Tensor

from maple.clip.backbone_names import (
    ARCHITECTURES,
    ASSUMED,
    GELU,
    HUB,
    PACKAGED,
    QUICKGELU,
    architecture_config,
    architecture_name,
    has_clip_blocks,
    is_architecture,
    is_hub_id,
    random_seed,
)
from maple.clip.checkpoints import formats
from maple.clip.checkpoints.siglip_format import build_siglip
from maple.clip.checkpoints.text_configs import size_of_text_tower, text_config, written
from maple.clip.checkpoints.transformers_format import read_transformers_folder
from maple.clip.foreign import FOREIGN_ERRORS, quiet
from maple.clip.hub import download
from maple.clip.initialisation import uninitialised
from maple.clip.tokenization.tokenizers import TransformersTokenizer, clip_tokenizer, described_tokenizer
from maple.clip.weights import load_weights
from maple.errors import BackboneDownloadError, BackboneError, first_line, one_of
from maple.hub_client import is_network_error, offline_if_unreachable

logger = logging.getLogger(__name__)

Parts = tuple[Any, Mapping[str, Any], Callable[[Sequence[str]], Tensor]]

_PREPROCESSING = ("mean", "std", "interpolation", "resize_mode")


def load_parts(name: str, pretrained: str | None, activation: str | None) -> Parts:
    """The model, its preprocessing and its tokenizer, of what `load_clip` takes but the packaged CLIPs.

    Raises:
        BackboneError: as `load_clip`.
    """
    local = Path(name)
    if is_architecture(name) or not (os.path.exists(name) or name.startswith(HUB) or is_hub_id(name)):
        return _from_architecture(name, pretrained, activation)
    if pretrained is not None and not (local.is_file() and pretrained in (QUICKGELU, GELU)):
        raise BackboneError(
            f"{name!r} has its own weights; pretrained={pretrained!r} can only be given with an architecture name"
            + (f" (with a file, {QUICKGELU} or {GELU}, its activation)" if local.is_file() else "")
        )
    if local.is_file():
        return _from_file(local, pretrained or activation)
    return _from_folder(local if local.is_dir() else download(name.removeprefix(HUB)))


def _from_file(path: Path, activation: str | None) -> Parts:
    state = formats.read_tensors(path)
    config = formats.openai_config(state, str(path))
    if not formats.is_openai(state):
        if activation is None:
            raise _unknown_activation(path, f"pretrained={QUICKGELU!r} or pretrained={GELU!r}")
        config["quick_gelu"] = activation != GELU
    model = build_model(config, formats.openai_state(state), str(path))
    tokenizer = clip_tokenizer(config["text_cfg"]["context_length"])
    return model, {**openai_preprocess(config), **(_described_next_to(path) or {})}, tokenizer


def _from_folder(folder: Path) -> Parts:
    has_transformers_config = (folder / "config.json").is_file()
    # Shards are transformers' own.
    is_sharded = not any((folder / name).is_file() for name in formats.OPEN_CLIP_WEIGHTS) and any(
        folder.glob("*.index.json")
    )
    if (folder / "open_clip_config.json").is_file() and not (has_transformers_config and is_sharded):
        config, preprocess = formats.read_open_clip_config(folder / "open_clip_config.json")
        weights = formats.open_clip_weights(folder)
        state = formats.read_tensors(weights)
        if not (has_transformers_config and formats.layout_hint(state)):
            model = build_model(config, state, str(weights), resize=True, folder=folder)
            preprocess = merge_preprocess_dict(
                default_preprocess(model.visual.image_size), {**preprocess, "size": model.visual.image_size}
            )
            return model, preprocess, described_tokenizer(config["text_cfg"], folder)
        del state  # they are read again, in transformers' layout
    if has_transformers_config:
        model_type, config, state, preprocess = read_transformers_folder(folder)
        model, text = build_model(config, state, str(folder)), config["text_cfg"]
        if model_type == "clip":
            return model, preprocess, clip_tokenizer(text["context_length"])
        return model, preprocess, TransformersTokenizer(folder, model_type, text["context_length"], text["vocab_size"])
    raise no_clip_in(folder)


def no_clip_in(folder: Path) -> BackboneError:
    """The error that a folder does not hold a CLIP."""
    return BackboneError(
        f"{folder} is not a CLIP: it needs open_clip_config.json (open_clip) or config.json (transformers) "
        "next to the weights"
    )


def _unknown_activation(path: Path, choice: str) -> BackboneError:
    return BackboneError(
        f"{path} does not say whether its CLIP was trained with QuickGELU, as OpenAI's and all that was fine-tuned "
        f"from those, or with GELU, as most others (LAION's, DataComp's); the wrong one gives wrong features: take "
        f"{choice}"
    )


def _from_architecture(name: str, pretrained: str | None, activation: str | None) -> Parts:
    architecture = architecture_name(name)
    if architecture in ARCHITECTURES:
        return _from_own_architecture(architecture, pretrained)
    config = architecture_config(architecture)
    if config is None:
        raise unknown_name(name)
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if pretrained is None:
        if "openai" not in tags:
            raise BackboneError(
                f"{name} needs pretrained=...: one of {', '.join(tags) or '(no tags)'}, a file, or 'random'"
            )
        pretrained = "openai"
    if (seed := random_seed(pretrained)) is not None:
        with _seeded(seed):
            return _published(architecture)
    tag = open_clip.get_pretrained_cfg(architecture, pretrained)
    if not tag and not Path(pretrained).expanduser().is_file():
        raise BackboneError(
            one_of(f"pretrained of {name}", pretrained, [*tags, "random", "random:SEED"], ", or the path of a file")
        )
    path = _download_weights(name, pretrained, tag) if tag else Path(pretrained).expanduser()
    state = formats.read_tensors(path)
    # The activation that the weights were trained with, where that is known; otherwise that of the configuration.
    trained = {"quick_gelu": bool({**config, **tag}.get("quick_gelu", False))} if tag else {}
    if tag and "quick_gelu" not in tag and activation in (QUICKGELU, GELU):
        # Prompts that were trained on the other one keep it.
        trained = {"quick_gelu": activation == QUICKGELU}
    if not tag and formats.is_openai(state):
        trained = {"quick_gelu": True}
    is_unknown = not trained and "quick_gelu" not in config and has_clip_blocks(config) and activation != ASSUMED
    if is_unknown and activation is not None:
        trained = {"quick_gelu": activation == QUICKGELU}
    model, preprocess, tokenizer = _published(architecture, state, str(path), resize=bool(tag), **trained)
    if is_unknown and activation is None:  # asked for only now: the weights fit
        raise _unknown_activation(path, f"{architecture}-{QUICKGELU} or {architecture}-{GELU}, not {architecture}")
    published = _preprocessing_in(tag) if tag else _described_next_to(path)
    if published is None:
        published = _preprocessing_of_tags(architecture, state)
    return model, {**preprocess, **published}, tokenizer


def _preprocessing_in(described: Mapping[str, Any]) -> dict[str, Any]:
    return {key: described[key] for key in _PREPROCESSING if key in described}


def _described_next_to(path: Path) -> dict[str, Any] | None:
    """The preprocessing in an open_clip_config.json next to a file of weights; None without one."""
    description = path.parent / "open_clip_config.json"
    return _preprocessing_in(formats.read_open_clip_config(description)[1]) if description.is_file() else None


def _preprocessing_of_tags(architecture: str, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The preprocessing with which open_clip's weights of an architecture were trained, for a file that does not say.

    Where they differ, it is OpenAI's, which is logged.
    """
    if formats.is_openai(state):
        return {}
    names = [architecture, *(architecture.removesuffix(f"-{activation}") for activation in (QUICKGELU, GELU))]
    tags = {(name, tag) for name in names for tag in open_clip.list_pretrained_tags_by_model(name)}
    known: list[dict[str, Any]] = []
    for name, tag in sorted(tags):
        values = _preprocessing_in(open_clip.get_pretrained_cfg(name, tag))
        known += [] if values in known else [values]
    if len(known) > 1:
        logger.warning(
            "%s: its weights were published for different means and deviations of pixels; OpenAI's are taken. If these "
            "are others, put the open_clip_config.json of the weights next to the file",
            architecture,
        )
    return known[0] if len(known) == 1 else {}


def unknown_name(name: str) -> BackboneError:
    """The error that there is no CLIP of this name, with the nearest ones."""
    known = [*open_clip.list_models(), *ARCHITECTURES, *PACKAGED]
    # However the words are written: vit-b-16, ViTB16.
    plain = {re.sub(r"[^a-z0-9]", "", each.casefold()): each for each in reversed(known)}
    matches = difflib.get_close_matches(re.sub(r"[^a-z0-9]", "", name.casefold()), plain, n=3, cutoff=0.5)
    near = ", ".join(plain[match] for match in matches)
    return BackboneError(
        f"unknown CLIP {name!r}: it is neither a file or folder here nor an open_clip architecture such as "
        f"ViT-B-16 or ViT-L-14 ({f'the nearest are {near}' if near else '`open_clip.list_models()` lists them'}"
        "); hub repositories are written hf-hub:org/model"
    )


def _from_own_architecture(name: str, pretrained: str | None) -> Parts:
    seed = random_seed("random" if pretrained is None else pretrained)
    if seed is None:
        raise BackboneError(one_of(f"pretrained of {name}", pretrained, ["random", "random:SEED"]))
    config = ARCHITECTURES[name]
    with _seeded(seed):
        model = open_clip.CLIP(**_copy(config))
    tokenizer = clip_tokenizer(config["text_cfg"]["context_length"])
    return model, openai_preprocess(config), tokenizer


def _download_weights(name: str, tag: str, published: Mapping[str, Any]) -> Path:
    try:
        with offline_if_unreachable():
            return Path(download_pretrained(published))
    except Exception as error:
        if not isinstance(error, OSError | RuntimeError | ValueError | HfHubHTTPError) and not is_network_error(error):
            raise
        raise BackboneDownloadError(
            f"the weights of {name} / {tag} cannot be downloaded: {first_line(error)} If this machine has no network, "
            f"download {_address(published)} elsewhere, with an open_clip_config.json that is next to it, and give the "
            f"file of {name}: pretrained=FILE"
        ) from error


def _address(published: Mapping[str, Any]) -> str:
    """Where the file of a tag of open_clip is, as it downloads it."""
    repository, _, file = str(published.get("hf_hub") or "").rpartition("/")
    if not repository:
        return str(published.get("url"))
    return f"{constants.ENDPOINT}/{repository}/resolve/main/{file or 'open_clip_model.safetensors'}"


def _published(
    architecture: str,
    state: Mapping[str, Tensor] | None = None,
    source: str = "",
    *,
    resize: bool = False,
    **trained: Any,
) -> Parts:
    """An architecture of open_clip with the weights of `state` (None: open_clip's random initialisation)."""
    config = {**(architecture_config(architecture) or {}), **trained}
    model = build_model(config, state, source or architecture, resize=resize, is_published=True)
    return model, default_preprocess(model.visual.image_size), described_tokenizer(config["text_cfg"], None)


def default_preprocess(image_size: Any) -> dict[str, Any]:
    """open_clip's preprocess settings where neither a tag nor a folder says others."""
    return {**asdict(PreprocessCfg()), "size": image_size}


def build_model(
    config: Mapping[str, Any],
    state: Mapping[str, Tensor] | None,
    source: str,
    *,
    resize: bool = False,
    is_published: bool = False,
    folder: Path | None = None,
    text: Mapping[str, Any] | None = None,
) -> Any:
    """An open_clip model of `config` with exactly the weights of `state`; None leaves open_clip's random ones.

    Args:
        resize: interpolate positional embeddings of another length, as open_clip does for the models it published.
        is_published: the configuration is open_clip's own, however large.
        folder: where the description is from, if it is a folder's.
        text: the configuration of a text tower of transformers; by default that of the folder or of the hub.

    Raises:
        BackboneError: a weight is missing, unknown, or of another shape; or the sizes do not fit together.
    """
    config = _copy(config)
    hf_name = config["text_cfg"].get("hf_model_name")
    text = text_config(hf_name, folder) if hf_name and text is None else text
    try:
        if state is not None and not is_published:
            formats.check_size(config, state, source, (0, 0.0) if text is None else size_of_text_tower(text))
        custom, trunk = config.pop("custom_text", False), config.pop("timm_trunk", None)
        with quiet(), _untouched_rng(), uninitialised(state is not None):
            kind = open_clip.CLIP
            if config["vision_cfg"].get("timm_model_name"):
                config["vision_cfg"]["timm_model_pretrained"] = False
            if custom or hf_name:
                kind = open_clip.CoCa if "multimodal_cfg" in config else open_clip.CustomTextCLIP
            if trunk is not None:
                model = build_siglip(config, trunk)
            elif text is not None:
                # By its name it could be a folder of the working directory, or have weights of its own.
                with written(text) as text_folder:
                    config["text_cfg"] |= {"hf_model_name": text_folder, "hf_model_pretrained": False}
                    model = kind(**config)
            else:
                model = kind(**config)
    except FOREIGN_ERRORS as error:
        raise BackboneError(f"{source} does not describe a CLIP, it cannot be built: {first_line(error)}") from error
    if state is not None:
        load_weights(model, state, source, resize=resize)
    return model


def openai_preprocess(config: Mapping[str, Any]) -> dict[str, Any]:
    """The preprocessing of OpenAI's CLIPs, for images of the size in `config`."""
    size = config["vision_cfg"]["image_size"]
    return {"size": size, "mean": OPENAI_DATASET_MEAN, "std": OPENAI_DATASET_STD, "interpolation": "bicubic"}


def _copy(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: dict(value) if isinstance(value, Mapping) else value for key, value in config.items()}


@contextmanager
def _untouched_rng() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        yield


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the CPU's generator, and restore it afterwards."""
    # torch.manual_seed would also seed the generators of accelerators, which fork_rng does not restore here.
    with _untouched_rng():
        torch.default_generator.manual_seed(seed)
        yield
