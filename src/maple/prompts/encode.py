"""The one block loop, for text and for images: plain CLIP with prompt tokens put in at the entry of blocks."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from maple.clip import ImageTower, TextTower
from maple.prompts.passes import answer
from maple.prompts.splice import Sentences, append_vision, replace_vision


def encode_text(tower: TextTower, sentences: Sentences, prompts: Sequence[Tensor]) -> Tensor:
    """Raw text features [C, D] of sentences whose slots hold `prompts`, one tensor per prompted layer.

    What all sentences begin with (SOS, shared prompts, shared words) is computed once, and their ends attend to it;
    of the last block only the EOT rows are computed. Under a causal mask both change nothing but rounding.

    Args:
        prompts: J tensors [P, Ht]; or [C, P, Ht] with a prompt per sentence; or [G, 1, P, Ht] or [G, C, P, Ht], which
            give the features of all sentences under each of G prompts: [G, C, D]. Layer k's enters block k.
    """
    return answer(_TextPass(tower, sentences, tuple(prompts)))


def encode_image(tower: ImageTower, images: Tensor, prompts: Sequence[Tensor]) -> Tensor:
    """Raw image features [B, D] of images [B, 3, R, R] with `prompts`; none means plain CLIP.

    Args:
        prompts: J tensors [P, Hv], or [B, P, Hv] with prompts per image. Layer k's enters block k.
    """
    return answer(_ImagePass(tower, images, tuple(prompts)))


@dataclass(frozen=True, eq=False)
class _TextPass:
    tower: TextTower
    sentences: Sentences
    prompts: tuple[Tensor, ...]

    @cached_property
    def _grouped(self) -> list[Tensor]:
        """The prompts as G of them: [G, 1, P, Ht] or [G, C, P, Ht]."""
        return [prompt[(None,) * (4 - prompt.ndim)] for prompt in self.prompts]

    @property
    def likeness(self) -> Hashable:
        shapes = tuple((prompt.shape[1:], prompt.dtype) for prompt in self._grouped)
        return self.tower, self.sentences.content, shapes, torch.is_grad_enabled()

    def alone(self) -> Tensor:
        return _encode_text(self.tower, self.sentences, self.prompts)

    def jointly(self, others: Sequence["_TextPass"]) -> list[Tensor]:
        passes = (self, *others)
        layers = [torch.cat(layer) for layer in zip(*(one._grouped for one in passes), strict=True)]
        if not layers:
            return [self.alone()] * len(passes)
        features = _encode_text(self.tower, self.sentences, layers)
        parts = features.split([len(one._grouped[0]) for one in passes])
        return [part if one.prompts[0].ndim == 4 else part.squeeze(0) for one, part in zip(passes, parts, strict=True)]


@dataclass(frozen=True, eq=False)
class _ImagePass:
    tower: ImageTower
    images: Tensor
    prompts: tuple[Tensor, ...]

    @property
    def likeness(self) -> Hashable:
        shapes = tuple((prompt.shape[-2:], prompt.dtype) for prompt in self.prompts)
        return self.tower, self.images.shape[1:], self.images.dtype, shapes, torch.is_grad_enabled()

    def alone(self) -> Tensor:
        return _encode_image(self.tower, self.images, self.prompts)

    def jointly(self, others: Sequence["_ImagePass"]) -> list[Tensor]:
        passes = (self, *others)
        counts = [len(one.images) for one in passes]
        layers = [
            torch.cat([prompt.expand(count, -1, -1) for prompt, count in zip(layer, counts, strict=True)])
            for layer in zip(*(one.prompts for one in passes), strict=True)
        ]
        return list(_encode_image(self.tower, torch.cat([one.images for one in passes]), layers).split(counts))


def _encode_text(tower: TextTower, sentences: Sentences, prompts: Sequence[Tensor]) -> Tensor:
    groups = [prompt.shape[0] for prompt in prompts if prompt.ndim == 4]
    per_sentence = any(prompt.ndim == 3 or (prompt.ndim == 4 and prompt.shape[1] > 1) for prompt in prompts)
    parts = sentences.parts(groups[0] if groups else 1, 1 if per_sentence else sentences.shared)
    prefix, suffix = tower.embed(parts.prefix_ids), tower.embed(parts.suffix_ids)
    for layer in range(tower.depth):
        if layer < len(prompts):
            prefix, suffix = parts.put(prefix, suffix, prompts[layer])
        if layer == 0:
            prefix, suffix = tower.enter(prefix), tower.enter(suffix, parts.shared)
        ends = parts.ends if layer == tower.depth - 1 else None
        prefix, suffix = tower.block_after_prefix(layer, prefix, suffix, ends)
    features = tower.finish(suffix[:, 0])
    return features.unflatten(0, (groups[0], -1)) if groups else features


def _encode_image(tower: ImageTower, images: Tensor, prompts: Sequence[Tensor]) -> Tensor:
    if not prompts:
        return tower.plain(images)
    states = tower.embed(images)
    count = states.shape[1]
    for layer in range(tower.depth):
        if layer == 0:
            states = tower.enter(append_vision(states, prompts[0]))
        elif layer < len(prompts):
            states = replace_vision(states, prompts[layer])
        last = layer == tower.depth - 1
        states = tower.block(layer, states, first_row_only=last and tower.reads_first_row)
    return tower.finish(states[:, :count])


def wide(features: Tensor) -> Tensor:
    """Features in float32 (in float64 where they are)."""
    return features if features.dtype.itemsize > 2 else features.float()


def unit(features: Tensor) -> Tensor:
    """L2-normalise features [..., D], in float32 (in float64 where they are)."""
    return F.normalize(wide(features), dim=-1)
