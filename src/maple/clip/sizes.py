"""How deep a CLIP is, told by its configuration alone: no weights are read, and nothing is fetched."""

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import open_clip

from maple.clip.formats import read_json
from maple.clip.load import ARCHITECTURES, PACKAGED

_USUAL = 12
"""What open_clip and transformers take where a configuration says nothing."""


def tower_depths(name: str) -> tuple[int, int] | None:
    """Blocks of the (text, image) tower of the CLIP that `load_clip` would load by this name.

    None where only loading it would tell (a file, a hub repository), or where a tower is no plain transformer.

    Raises:
        BackboneError: a configuration file is unreadable.
    """
    config = _config(name)
    if config is None:
        return None
    text, image = (_layers(config, side) for side in ("text_cfg", "vision_cfg"))
    return None if text is None or image is None else (text, image)


def _config(name: str) -> Mapping[str, Any] | None:
    architecture = name.replace("/", "-")
    if name in PACKAGED:
        with resources.as_file(resources.files("maple").joinpath("assets", PACKAGED[name])) as folder:
            return _folder_config(folder)
    if architecture in ARCHITECTURES:
        return ARCHITECTURES[architecture]
    if architecture in open_clip.list_models():
        found: Mapping[str, Any] | None = open_clip.get_model_config(architecture)
        return found
    folder = Path(name).expanduser()
    return _folder_config(folder) if folder.is_dir() else None


def _folder_config(folder: Path) -> Mapping[str, Any] | None:
    if (folder / "open_clip_config.json").is_file():
        config = read_json(folder / "open_clip_config.json").get("model_cfg")
        return config if isinstance(config, Mapping) else None
    if (folder / "config.json").is_file():
        config = read_json(folder / "config.json")
        sides = {"text_cfg": config.get("text_config"), "vision_cfg": config.get("vision_config")}
        return {
            side: {"layers": values.get("num_hidden_layers", _USUAL)}
            for side, values in sides.items()
            if isinstance(values, Mapping)
        }
    return None


def _layers(config: Mapping[str, Any], side: str) -> int | None:
    values = config.get(side)
    if not isinstance(values, Mapping) or values.get("hf_model_name") or values.get("timm_model_name"):
        return None
    layers = values.get("layers", _USUAL)
    return layers if isinstance(layers, int) else None
