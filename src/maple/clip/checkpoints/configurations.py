"""What can be known of a CLIP without loading it: its configuration, how deep it is, how long a sentence may be."""

from collections import ChainMap
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from maple.clip.backbone_names import ARCHITECTURES, PACKAGED, architecture_config, architecture_name
from maple.errors import BackboneError
from maple.files import read_json

_DEFAULT_DEPTH, _DEFAULT_LENGTH = 12, 77  # of open_clip and transformers, if a configuration does not set them


def tower_depths(name: str) -> tuple[int, int] | None:
    """Read the number of blocks of the (text, image) towers from the configuration alone, without a download.

    None if the model `name`, as in `load_clip`, has to be loaded to know (a file, a hub repository), or if a tower is
    not a transformer of open_clip's own.

    Raises:
        BackboneError: a configuration file is unreadable.

    Example:
        >>> tower_depths("ViT-L-14")
        (12, 24)
    """
    config = _config(name)
    if config is None:
        return None
    depths = []
    for tower in ("text_cfg", "vision_cfg"):
        values = config.get(tower)
        if not isinstance(values, Mapping) or values.get("hf_model_name") or values.get("timm_model_name"):
            return None
        depths.append(values.get("layers", _DEFAULT_DEPTH))
    return (depths[0], depths[1]) if all(isinstance(depth, int) for depth in depths) else None


def sentence_limit(name: str) -> tuple[Callable[[str], int], int] | None:
    """How to count the tokens of a sentence, and the most that a CLIP reads, from its configuration alone.

    None if the model has to be loaded to know, or has another tokenizer than CLIP's.
    """
    text = (_config(name) or {}).get("text_cfg")
    if not isinstance(text, Mapping):
        return None
    if any(text.get(key) for key in ("hf_tokenizer_name", "hf_model_name", "tokenizer_kwargs")):
        return None
    from maple.clip.tokenization.tokenizers import clip_tokenizer

    limit = text.get("context_length", _DEFAULT_LENGTH)
    if not isinstance(limit, int):  # as the loader will report
        return None
    tokenizer: Any = clip_tokenizer(limit)
    return lambda sentence: len(tokenizer.encode(sentence)) + 2, limit


def _config(name: str) -> Mapping[str, Any] | None:
    """The open_clip configuration of a model that is known or in a folder here."""
    architecture = architecture_name(name)
    if name in PACKAGED:
        with resources.as_file(resources.files("maple").joinpath("assets", PACKAGED[name])) as folder:
            return _folder_config(folder)
    if architecture in ARCHITECTURES:
        return ARCHITECTURES[architecture]
    return architecture_config(architecture) or _folder_config(Path(name).expanduser())


def _folder_config(folder: Path) -> Mapping[str, Any] | None:
    config: dict[str, Any]
    if (folder / "open_clip_config.json").is_file():
        config = read_json(folder / "open_clip_config.json", error=BackboneError, foreign=True)
        model = config.get("model_cfg")
        return model if isinstance(model, Mapping) else None
    if (folder / "config.json").is_file():
        config = read_json(folder / "config.json", error=BackboneError, foreign=True)
        other_tokenizer = None if config.get("model_type") == "clip" else str(folder)
        towers: dict[str, dict[str, Any]] = {}
        for tower in ("text", "vision"):
            # Old files have some sizes in a second place, which wins, as in `read_transformers_config`.
            stored = (config.get(f"{tower}_config_dict"), config.get(f"{tower}_config"))
            if places := [values for values in stored if isinstance(values, dict)]:
                sizes = ChainMap(*places)
                towers[f"{tower}_cfg"] = {
                    "layers": sizes.get("num_hidden_layers", _DEFAULT_DEPTH),
                    "context_length": sizes.get("max_position_embeddings", _DEFAULT_LENGTH),
                    "hf_tokenizer_name": other_tokenizer,
                }
        return towers
    return None
