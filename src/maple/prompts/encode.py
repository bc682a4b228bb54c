"""The one block loop, for text and for images: plain CLIP with prompt tokens put in at the entry of blocks."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from maple.clip import ImageTower, TextTower
from maple.clip.blocks import PrefixCache
from maple.clip.cpu_linear import is_exporting_or_compiling
from maple.errors import UnsupportedTowerError
from maple.memory import device_memory
from maple.prompts.passes import run_or_defer
from maple.prompts.splice import Parts, Sentences, Suffix, append_vision, replace_vision

# Of each row and block, in widths of the tower: the norms' inputs, queries, keys, values, attention, four of the MLP.
_STATES_PER_ROW = 12

# Of image states on a CPU, without gradients: eight pictures of ViT-B/16.
_ROWS_AT_ONCE = 1600


def encode_text(
    tower: TextTower, sentences: Sentences, prompts: Sequence[Tensor], memory_limit: int | None = None
) -> Tensor:
    """Raw text features [C, D] of sentences whose slots hold `prompts`, one tensor per prompted layer.

    What all sentences begin with (SOS, shared prompts, shared words) is computed once, and their ends attend to it;
    these are packed without padding; of the last block only the EOT rows are computed. Under a causal mask none of it
    changes anything but rounding.

    Args:
        prompts: J tensors [P, Ht]; or [C, P, Ht] with a prompt per sentence; or [G, 1, P, Ht] or [G, C, P, Ht], which
            give the features of all sentences under each of G prompts: [G, C, D]. Layer k's enters block k.
        memory_limit: bytes that the states of the sentences' ends may take, about; where it would be more, they are
            computed in pieces, and once more for the gradient. By default a quarter of the device's memory.
    """
    request = _TextPass(tower, sentences, tuple(prompts), memory_limit)
    return run_or_defer(request) if prompts else request.run()  # fixed sentences are encoded once: nothing to share


def encode_image(tower: ImageTower, images: Tensor, prompts: Sequence[Tensor]) -> Tensor:
    """Raw image features [B, D] of images [B, 3, R, R] with `prompts`; none means plain CLIP.

    Args:
        prompts: J tensors [P, Hv], or [B, P, Hv] with prompts per image. Layer k's enters block k.
    """
    return run_or_defer(_ImagePass(tower, images, tuple(prompts)))


@dataclass(frozen=True, eq=False)
class _TextPass:
    tower: TextTower
    sentences: Sentences
    prompts: tuple[Tensor, ...]
    memory_limit: int | None

    @cached_property
    def _grouped(self) -> list[Tensor]:
        """The prompts as G of them: [G, 1, P, Ht] or [G, C, P, Ht]."""
        return [prompt[(None,) * (4 - prompt.ndim)] for prompt in self.prompts]

    @property
    def batch_key(self) -> Hashable:
        shapes = tuple((prompt.shape[1:], prompt.dtype) for prompt in self._grouped)
        return self.tower, self.sentences.content, shapes, self.memory_limit

    def run(self) -> Tensor:
        return _encode_text(self.tower, self.sentences, self.prompts, self.memory_limit)

    def run_batch(self, others: Sequence["_TextPass"]) -> list[Tensor]:
        passes = (self, *others)
        layers = [torch.cat(layer) for layer in zip(*(request._grouped for request in passes), strict=True)]
        features = _encode_text(self.tower, self.sentences, layers, self.memory_limit)
        parts = features.split([len(request._grouped[0]) for request in passes])
        return [
            part if request.prompts[0].ndim == 4 else part.squeeze(0)
            for request, part in zip(passes, parts, strict=True)
        ]


@dataclass(frozen=True, eq=False)
class _ImagePass:
    tower: ImageTower
    images: Tensor
    prompts: tuple[Tensor, ...]

    @property
    def batch_key(self) -> Hashable:
        shapes = tuple((prompt.shape[-2:], prompt.dtype) for prompt in self.prompts)
        return self.tower, self.images.shape[1:], self.images.dtype, shapes

    def run(self) -> Tensor:
        return _encode_image(self.tower, self.images, self.prompts)

    def run_batch(self, others: Sequence["_ImagePass"]) -> list[Tensor]:
        passes = (self, *others)
        counts = [len(request.images) for request in passes]
        layers = [
            torch.cat([prompt.expand(count, -1, -1) for prompt, count in zip(layer, counts, strict=True)])
            for layer in zip(*(request.prompts for request in passes), strict=True)
        ]
        return list(_encode_image(self.tower, torch.cat([request.images for request in passes]), layers).split(counts))


def _encode_text(tower: TextTower, sentences: Sentences, prompts: Sequence[Tensor], memory_limit: int | None) -> Tensor:
    groups = [prompt.shape[0] for prompt in prompts if prompt.ndim == 4]
    per_sentence = any(prompt.ndim == 3 or (prompt.ndim == 4 and prompt.shape[1] > 1) for prompt in prompts)
    for_gradient = torch.is_grad_enabled() and any(prompt.requires_grad for prompt in prompts)
    limit = device_memory(sentences.ids.device) // 4 if memory_limit is None else memory_limit
    most_rows = limit // (_STATES_PER_ROW * tower.width * tower.dtype.itemsize * (tower.depth if for_gradient else 1))
    parts = sentences.cut(groups[0] if groups else 1, 1 if per_sentence else sentences.shared, max(most_rows, 1))
    memories = _prefix(tower, parts, prompts)
    found = []
    for suffix in parts.suffixes:
        if for_gradient and len(parts.suffixes) > 1:
            found.append(checkpoint(_suffix, tower, suffix, prompts, memories, use_reentrant=False))
        else:
            found.append(_suffix(tower, suffix, prompts, memories))
    features = torch.cat(found, dim=1)[:, parts.order]
    return features if groups else features[0]


def _prefix(tower: TextTower, parts: Parts, prompts: Sequence[Tensor]) -> list[PrefixCache]:
    """What the ends of sentences have to know of their common beginning, for each block."""
    states, memories = tower.embed(parts.prefix_ids), []
    for layer in range(tower.depth):
        if layer < len(prompts):
            states = parts.put(states, prompts[layer])
        if layer == 0:
            states = tower.enter(states)
        memory, states = tower.prefix(layer, states, cache_only=layer == tower.depth - 1)
        memories.append(memory)
    return memories


def _suffix(tower: TextTower, suffix: Suffix, prompts: Sequence[Tensor], memories: Sequence[PrefixCache]) -> Tensor:
    """Raw features [G, c, D] of the sentences of one suffix."""
    rows = tower.embed(suffix.ids)
    for layer, memory in enumerate(memories):
        if layer < len(prompts):
            rows = suffix.put(rows, prompts[layer])
        if layer == 0:
            rows = tower.enter(rows, suffix.positions)
        rows = tower.suffix(layer, memory, rows, suffix.buckets, ends_only=layer == tower.depth - 1)
    return suffix.by_sentence(tower.finish(rows))


def encode_image_with_attention(
    tower: ImageTower, images: Tensor, prompts: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """As `encode_image`, and the attention of every block, [B, heads, n, n]; differentiable, and slower.

    Raises:
        UnsupportedTowerError: the tower has no blocks whose attention can be read.
    """
    if tower.obstacle is not None:
        raise UnsupportedTowerError(
            f"what attends to which part of an image cannot be read: {tower.obstacle}; heat maps need a CLIP with a "
            "vision transformer, such as ViT-B-16"
        )
    states = tower.embed(images)
    count = states.shape[1]
    seen = []
    for layer in range(tower.depth):
        states = _enter(tower, layer, states, prompts)
        states, attention = tower.block_with_attention(layer, states)
        seen.append(attention)
    return tower.finish(states[:, :count]), seen


def _encode_image(tower: ImageTower, images: Tensor, prompts: Sequence[Tensor]) -> Tensor:
    if tower.obstacle is not None:
        return tower.plain(images)  # no method puts prompts here: see `require_promptable`
    states = tower.embed(images)
    at_once = _images_at_once(states, prompts)
    if at_once is None:
        return _image_features(tower, states, prompts)
    parts = states.split(at_once)
    each = [prompt.split(at_once) if prompt.ndim == 3 else [prompt] * len(parts) for prompt in prompts]
    return torch.cat([_image_features(tower, part, layers) for part, *layers in zip(parts, *each, strict=True)])


def _images_at_once(states: Tensor, prompts: Sequence[Tensor]) -> int | None:
    """How many images go through the blocks side by side; None for all.

    A CPU's caches hold the states of few, and memory for those of many is new to it at every block. With gradients all
    states are kept anyway.
    """
    learns = torch.is_grad_enabled() and any(prompt.requires_grad for prompt in prompts)
    if states.device.type != "cpu" or learns or is_exporting_or_compiling():
        return None
    return max(_ROWS_AT_ONCE // states.shape[1], 1)


def _image_features(tower: ImageTower, states: Tensor, prompts: Sequence[Tensor]) -> Tensor:
    """Raw features [B, D] of embedded images [B, 1 + N, Hv]."""
    count = states.shape[1]
    for layer in range(tower.depth):
        states = _enter(tower, layer, states, prompts)
        last = layer == tower.depth - 1
        states = tower.block(layer, states, first_row_only=last and tower.pools_class_token)
    return tower.finish(states[:, :count])


def _enter(tower: ImageTower, layer: int, states: Tensor, prompts: Sequence[Tensor]) -> Tensor:
    """What block `layer` reads: the states, with that layer's prompts."""
    if layer == 0:
        return tower.enter(append_vision(states, prompts[0]) if prompts else states)
    return replace_vision(states, prompts[layer]) if layer < len(prompts) else states


def to_float32(features: Tensor) -> Tensor:
    """Features in float32 (in float64 where they are)."""
    return features if features.dtype.itemsize > 2 else features.float()


def l2_normalize(features: Tensor) -> Tensor:
    """L2-normalise features [..., D], in float32 (in float64 where they are)."""
    return F.normalize(to_float32(features), dim=-1)
