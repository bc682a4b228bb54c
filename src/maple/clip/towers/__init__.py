"""The towers of a CLIP, split into the stages between which prompts enter; one file for each family of towers.

A tower runs as `embed -> enter -> block 0 .. block L-1 -> finish`. The published prompt learners patched a fork of CLIP
for this; here the stages are those of unmodified models, and the files of this package are the only ones that know
their attributes. Positions, masks and pooling are the tower's business: methods know nothing of them. Towers without
such stages (ResNets, ConvNeXt) run through `plain`.

Source: CLIP (Radford et al., 2021), section 2.4; muzairkhattak/multimodal-prompt-learning@69bce21
clip/model.py:313-328 and 452-463 for where prompts enter.
"""

from typing import Any

import torch

from maple.clip.plain_model import PlainCLIP
from maple.clip.towers.base import ImageTower, TextTower, Tower
from maple.clip.towers.open_clip_image import OpenClipImageTower
from maple.clip.towers.open_clip_text import OpenClipTextTower

__all__ = ["ImageTower", "TextTower", "Tower", "image_tower", "text_tower"]


def text_tower(model: Any, dtype: torch.dtype) -> TextTower:
    """The text tower of an open_clip model, for states in `dtype`.

    Example:
        >>> text_tower(open_clip.create_model("ViT-B-16"), torch.float32).depth
        12
    """
    tower = getattr(model, "text", model)
    if isinstance(model, PlainCLIP):
        return OpenClipTextTower(model, dtype)
    from open_clip.hf_model import HFTextEncoder
    from open_clip.transformer import TextTransformer

    if tower is model or isinstance(tower, TextTransformer):
        return OpenClipTextTower(model, dtype)
    if isinstance(tower, HFTextEncoder):
        # Only now: transformers is an optional package, and takes seconds to import.
        from maple.clip.towers.hugging_face_text import hugging_face_text_tower

        return hugging_face_text_tower(model, dtype)
    return TextTower(
        model, dtype, f"its text tower is a {type(tower).__name__}, which is not an open_clip text transformer"
    )


def image_tower(model: Any, dtype: torch.dtype) -> ImageTower:
    """The image tower of an open_clip model, for states in `dtype`.

    Example:
        >>> image_tower(open_clip.create_model("RN50"), torch.float32).obstacle
        'its image tower is a ModifiedResNet, not a vision transformer'
    """
    tower = model.visual
    if isinstance(model, PlainCLIP):
        return OpenClipImageTower(model, dtype)
    from open_clip.timm_model import TimmModel
    from open_clip.transformer import VisionTransformer

    from maple.clip.towers.timm_image import TimmImageTower

    if isinstance(tower, VisionTransformer):
        return OpenClipImageTower(model, dtype)
    if isinstance(tower, TimmModel):
        return TimmImageTower(model, dtype)
    return ImageTower(model, dtype, f"its image tower is a {type(tower).__name__}, not a vision transformer")
