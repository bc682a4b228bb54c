"""The one block loop, for text and for images: plain CLIP with prompt tokens put in at the entry of blocks."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from maple.clip import ImageTower, TextTower
from maple.prompts.splice import Sentences, append_vision, at_ends, put_text, replace_vision


def encode_text(tower: TextTower, sentences: Sentences, prompts: Sequence[Tensor]) -> Tensor:
    """Raw text features [C, D] of sentences whose slots hold `prompts`, one tensor per prompted layer.

    Args:
        prompts: J tensors [P, Ht], or [C, P, Ht] with a prompt per sentence; layer k's enters block k.
    """
    states = tower.embed(sentences.ids)
    for layer in range(tower.depth):
        if layer < len(prompts):
            states = put_text(states, prompts[layer], sentences.slots)
        states = tower.block(layer, tower.enter(states) if layer == 0 else states)
    return tower.finish(at_ends(states, sentences.ends))


def encode_image(tower: ImageTower, images: Tensor, prompts: Sequence[Tensor]) -> Tensor:
    """Raw image features [B, D] of images [B, 3, R, R] with `prompts`, J tensors [P, Hv]; none means plain CLIP."""
    if not prompts:
        return tower.plain(images)
    states = tower.embed(images)
    count = states.shape[1]
    for layer in range(tower.depth):
        if layer == 0:
            states = tower.enter(append_vision(states, prompts[0]))
        elif layer < len(prompts):
            states = replace_vision(states, prompts[layer])
        states = tower.block(layer, states)
    return tower.finish(states[:, :count])


def wide(features: Tensor) -> Tensor:
    """Features in float32 (in float64 where they are)."""
    return features if features.dtype.itemsize > 2 else features.float()


def unit(features: Tensor) -> Tensor:
    """L2-normalise features [..., D], in float32 (in float64 where they are)."""
    return F.normalize(wide(features), dim=-1)
