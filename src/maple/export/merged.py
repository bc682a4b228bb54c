"""Merge what a method learned in the blocks of a CLIP into the weights, where it changes nothing but these.

Low-rank updates are matrices that can be added to the attention's, and norms replace the block's own. Prompts, tokens
and residual branches are not weights of a plain CLIP.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from maple.clip import Backbone, LayerEdit
from maple.export.graphs import innermost
from maple.methods import ZERO_SHOT, Method, build_method
from maple.prompts import PromptedClasses

_TOWERS = {"image": "visual.transformer.resblocks", "text": "transformer.resblocks"}


def unmergeable(edits: Sequence[LayerEdit]) -> str:
    """What these edits have that is not weights of the blocks, for messages; "" if they can be merged."""
    kinds = {"prompts": "prompt", "tokens": "tokens", "adapters of the input": "input_residual", "adapters": "residual"}
    return ", ".join(kind for kind, name in kinds.items() if any(getattr(edit, name) is not None for edit in edits))


def merges(method: Method) -> bool:
    """Whether a method changes weights of the CLIP itself, and both towers can hold what they have."""
    towers = (method.vision_edits(), method.text_edits())
    return any(towers) and not any(map(unmergeable, towers))


@torch.no_grad()
def merge(method: Method, state: dict[str, Tensor]) -> None:
    """Merge a method into a state dict of its CLIP, in open_clip's layout, whose tensors are changed in place.

    `logit_scale` becomes that of the method, divided by its temperature, so that probabilities are the method's.
    """
    for tower, edits in (("image", method.vision_edits()), ("text", method.text_edits())):
        for layer, edit in enumerate(edits):
            block = f"{_TOWERS[tower]}.{layer}"
            for number, affine in enumerate(edit.norms, start=1):
                if affine is not None:
                    state[f"{block}.ln_{number}.weight"].copy_(affine[0])
                    state[f"{block}.ln_{number}.bias"].copy_(affine[1])
            for projection, update in edit.low_rank.items():
                if projection == "o":
                    state[f"{block}.attn.out_proj.weight"].add_(update.weight())
                else:
                    packed = state[f"{block}.attn.in_proj_weight"]
                    packed.chunk(3)["qkv".index(projection)].add_(update.weight())
    state["logit_scale"].fill_(math.log(method.logit_scale / method.temperature))


def templates_of(method: Method) -> list[str]:
    """The sentences whose features the method compares images with, if it has learned no words; for new names."""
    classes = innermost(method).classes
    if isinstance(classes, PromptedClasses):
        return [classes.template] if classes.template and not classes.prompt_length else []
    return list(classes.templates)


def new_names_on(loaded: Backbone, method: Method, names: Sequence[str]) -> Method:
    """Zero-shot CLIP on a merged checkpoint: what it predicts for names that were not trained."""
    return build_method({"name": ZERO_SHOT, "templates": templates_of(method)}, loaded, names)


def notes_on(method: Method, precision: str) -> list[str]:
    """What the user of a merged checkpoint should know, in sentences.

    Args:
        precision: that of the training.
    """
    notes = []
    sentences = " and ".join(map(repr, templates_of(method)))
    with torch.no_grad():
        by_text = Method.encode_classes(innermost(method))
    if torch.allclose(method.class_embeddings(), by_text, atol=1e-6):
        notes.append(f"merged into the weights: {sentences} gives the method's logits, for any class name")
    else:
        notes.append(
            f"merged into the weights: {sentences} gives the method's logits for class names that were not trained; "
            "those of trained names need their classifier, class_embeddings of zero_shot_head.safetensors, which is "
            "not a part of a CLIP"
        )
    scale, of_clip = method.logit_scale / method.temperature, method.backbone.logit_scale
    if not math.isclose(scale, of_clip, rel_tol=1e-6):
        reason = "" if method.temperature == 1 else f" divided by the temperature {method.temperature:.4g}"
        notes.append(f"exp(logit_scale) is {scale:.6g}, the method's{reason}, where this CLIP has {of_clip:.6g}")
    if precision != "fp32":
        notes.append(f"trained in {precision}, merged and written in float32")
    return notes
