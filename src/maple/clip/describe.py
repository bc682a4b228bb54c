"""What a CLIP has and what it permits, from its configuration, or from the sizes of the tensors in a file."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from open_clip.transformer import TextTransformer, VisionTransformer

from maple.clip.backbone_names import (
    ARCHITECTURES,
    HUB,
    PACKAGED,
    architecture_config,
    is_architecture,
    is_hub_id,
    with_absolute_paths,
)
from maple.clip.checkpoints import formats
from maple.clip.checkpoints.open_clip_models import build_model, unknown_name
from maple.clip.checkpoints.transformers_format import read_transformers_config
from maple.clip.hub import download
from maple.clip.initialisation import uninitialised
from maple.clip.known_backbones import TEXT_CONFIGS
from maple.clip.towers import ImageTower, Tower, image_tower, text_tower
from maple.errors import BackboneError, UnsupportedTowerError

_MOST_LAYERS = 1000
FAMILIES = {
    "text prompts": "CoOp, CoCoOp, deep language prompting, KgCoOp, ProGrad, TCP, DePT on these",
    "image prompts": "VPT",
    "both towers": "MaPLe, IVLP, PromptSRC",
    "features of tokens": "MMRL, MMRL++",
    "inside the blocks": "CLIP-LoRA, 2SFS, MMA",
    "frozen features": "zero-shot CLIP, linear probe, CLIP-Adapter, Tip-Adapter, TaskRes, CLAP, LP++, GDA",
}
"""What methods change, with examples."""


@dataclass(frozen=True)
class TowerDescription:
    """One tower of a CLIP.

    Attributes:
        kind: the class that it is made of.
        depth, width: its blocks and their channels; 0 where prompts cannot enter.
        prompts: why prompts cannot enter, or None.
        edits: why layers inside its blocks cannot be changed, or None.
        tokens: why single tokens have no features, or None.
    """

    kind: str
    depth: int
    width: int
    prompts: str | None
    edits: str | None
    tokens: str | None


@dataclass(frozen=True)
class BackboneDescription:
    """A CLIP, as its configuration describes it.

    Attributes:
        parameters: of both towers together.
        image_size: the sides of its images, in pixels.
        embed_dim: D, the length of its features.
        context_length: T, the tokens of the longest sentence.
        vocabulary: how many token embeddings it has.

    Example:
        >>> describe_backbone("ViT-B-16").parameters
        149620737
    """

    parameters: int
    image_size: tuple[int, int]
    embed_dim: int
    context_length: int
    vocabulary: int
    text: TowerDescription
    image: TowerDescription

    def families(self) -> dict[str, str | None]:
        """For each of FAMILIES, why its methods do not run on this CLIP, or None if they do."""
        text, image = self.text, self.image
        return {
            "text prompts": text.prompts,
            "image prompts": image.prompts,
            "both towers": text.prompts or image.prompts,
            "features of tokens": text.prompts or image.tokens,
            "inside the blocks": text.edits or image.edits,
            "frozen features": None,
        }


def describe_backbone(name: str) -> BackboneDescription:
    """Describe a CLIP that `load_clip` knows by this name: an architecture, a folder, a repository or a file.

    Of a repository, the description is downloaded, without weights; a file, which has no other description, is read.

    Raises:
        BackboneError: it is unknown, or does not describe a CLIP.

    Example:
        >>> describe_backbone("RN50").families()["image prompts"]
        'its image tower is a ModifiedResNet, not a vision transformer'
    """
    name, _ = with_absolute_paths(name, None)
    if not is_architecture(name) and (os.path.exists(name) or name.startswith(HUB) or is_hub_id(name)):
        path = Path(name) if os.path.exists(name) else download(name.removeprefix(HUB), weights=False)
        if path.is_dir():
            return _describe_folder(path)
        return describe_config(formats.openai_config(formats.read_tensors(path), name), name)
    if name in PACKAGED:
        with resources.as_file(resources.files("maple").joinpath("assets", PACKAGED[name])) as folder:
            return _describe_folder(folder)
    config = ARCHITECTURES.get(name) or architecture_config(name)
    if config is None:
        raise unknown_name(name)
    return describe_config(config, name)


def _describe_folder(folder: Path) -> BackboneDescription:
    if (folder / "open_clip_config.json").is_file():
        config, _ = formats.read_open_clip_config(folder / "open_clip_config.json")
        return describe_config(config, str(folder), folder)
    if (folder / "config.json").is_file():
        return describe_config(read_transformers_config(folder)[1], str(folder))
    raise BackboneError(
        f"{folder} is not a CLIP: it needs open_clip_config.json (open_clip) or config.json (transformers)"
    )


def describe_config(config: Mapping[str, Any], source: str, folder: Path | None = None) -> BackboneDescription:
    """Describe the CLIP of an open_clip configuration; the arguments are those of `model_without_weights`.

    Raises:
        BackboneError: it does not describe a CLIP.
    """
    return describe_model(model_without_weights(config, source, folder), config)


def model_without_weights(config: Mapping[str, Any], source: str, folder: Path | None = None) -> Any:
    """An open_clip model on the meta device, where tensors have shapes and no memory.

    Args:
        config: open_clip's.
        source: its name, for messages.
        folder: the folder that the configuration is from; None for a published one, whose text tower, if it is
            transformers' own, has the published sizes of `TEXT_CONFIGS`.

    Raises:
        BackboneError: the configuration does not describe a CLIP.
    """
    text = config["text_cfg"]
    published = TEXT_CONFIGS.get(str(text.get("hf_model_name"))) if folder is None else None
    for part in ("text_cfg", "vision_cfg", "multimodal_cfg"):
        layers = (config.get(part) or {}).get("layers", 0)
        if isinstance(layers, int) and layers > _MOST_LAYERS:
            raise BackboneError(f"{source} describes a tower of {layers} layers; at most {_MOST_LAYERS} are supported")
    with torch.device("meta"), uninitialised():
        return build_model(config, None, source, folder=folder, text=published).eval().requires_grad_(False)


def describe_model(model: Any, config: Mapping[str, Any]) -> BackboneDescription:
    """Describe an open_clip model of a configuration."""
    text, size = config["text_cfg"], model.visual.image_size
    return BackboneDescription(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        image_size=tuple(size) if isinstance(size, list | tuple) else (size, size),
        embed_dim=int(config["embed_dim"]),
        context_length=int(text.get("context_length", 77)),
        vocabulary=int(getattr(model, "vocab_size", text.get("vocab_size", 0))),
        text=_describe_tower(text_tower(model, torch.float32), getattr(model, "text", model)),
        image=_describe_tower(image_tower(model, torch.float32), model.visual),
    )


def _describe_tower(tower: Tower, module: Any) -> TowerDescription:
    edits = _reason(tower, tower.require_standard_blocks)
    tokens = _reason(tower, tower.require_token_features) if isinstance(tower, ImageTower) else tower.obstacle
    if hasattr(module, "visual"):  # the text tower of a plain CLIP is not a module of its own
        kind = "TextTransformer"
    else:
        inner = getattr(module, "trunk", getattr(module, "transformer", module))  # of timm; of transformers
        kind = type(module if isinstance(module, TextTransformer | VisionTransformer) else inner).__name__
    return TowerDescription(kind, tower.depth, tower.width, tower.obstacle, edits, tokens)


def _reason(tower: Tower, require: Callable[[str], None]) -> str | None:
    """Why a tower refuses what `require` asks of it, or None."""
    if tower.obstacle is not None:
        return tower.obstacle
    try:
        require("a method")
    except UnsupportedTowerError as error:
        # Without the name of the method before it, and the advice after it.
        return str(error).partition(", but ")[2].partition(";")[0]
    return None
