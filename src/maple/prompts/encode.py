"""The block loop for text and images: plain CLIP with prompt tokens inserted at the entry of blocks."""

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
from maple.distributed import device_memory
from maple.errors import UnsupportedTowerError
from maple.prompts.passes import run_or_defer
from maple.prompts.splice import PackedSuffix, Sentences, append_vision, replace_vision

# Per row and block, in widths of the tower: inputs of the norms, queries, keys, values, attention, four of the MLP.
_STATES_PER_ROW = 12

# Rows of image states that go through the blocks together on a CPU without gradients: eight images of ViT-B/16.
_ROWS_AT_ONCE = 1600


def encode_text(
    tower: TextTower, sentences: Sentences, prompts: Sequence[Tensor], memory_limit: int | None = None
) -> Tensor:
    """Encode sentences with prompts in their slots: raw text features [C, D].

    The common prefix of all sentences (SOS, shared prompts, shared words) is computed once, and their suffixes, packed
    almost without padding, attend to it; in the last block only the EOT rows are computed. Under a causal mask this
    changes the result by rounding only.

    Args:
        prompts: J tensors [P, Ht], or [C, P, Ht] for a prompt per sentence, or [G, 1, P, Ht] or [G, C, P, Ht] for the
            features of all sentences with each of G prompts, [G, C, D]. The tensor of layer k enters block k.
        memory_limit: bytes, about, that the states of the suffixes may take; beyond it they are computed in pieces,
            and recomputed for the gradient. By default a quarter of the device's memory.

    Example:
        >>> sentences = write_sentences(clip, ["cat", "dog"], prompt_length=2)
        >>> encode_text(clip.text, sentences, [torch.zeros(2, clip.text.width)]).shape
        torch.Size([2, 512])
    """
    request = _TextPass(tower, sentences, tuple(prompts), memory_limit)
    return run_or_defer(request) if prompts else request.run()  # fixed sentences are encoded once: nothing to share


def encode_image(tower: ImageTower, images: Tensor, prompts: Sequence[Tensor]) -> Tensor:
    """Encode images [B, 3, R, R] with prompts: raw image features [B, D]; those of plain CLIP without prompts.

    Args:
        prompts: J tensors [P, Hv], or [B, P, Hv] for a prompt per image. The tensor of layer k enters block k.

    Example:
        >>> encode_image(clip.image, torch.zeros(1, 3, 224, 224), [torch.zeros(2, clip.image.width)]).shape
        torch.Size([1, 512])
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
    # A prompt per sentence cannot be in a shared prefix: then only SOS is.
    split = sentences.split(groups[0] if groups else 1, 1 if per_sentence else sentences.shared, max(most_rows, 1))
    states, caches = tower.embed(split.prefix_ids), []
    for layer in range(tower.depth):
        if layer < len(prompts):
            states = split.insert_prompts(states, prompts[layer])
        if layer == 0:
            states = tower.enter(states)
        cache, states = tower.prefix(layer, states, cache_only=layer == tower.depth - 1)
        caches.append(cache)
    features = []
    for suffix in split.suffixes:
        if for_gradient and len(split.suffixes) > 1:  # keep the states of one piece at a time, recompute the others
            features.append(checkpoint(_encode_suffix, tower, suffix, prompts, caches, use_reentrant=False))
        else:
            features.append(_encode_suffix(tower, suffix, prompts, caches))
    by_class = torch.cat(features, dim=1)[:, split.order]
    return by_class if groups else by_class[0]


def _encode_suffix(
    tower: TextTower, suffix: PackedSuffix, prompts: Sequence[Tensor], caches: Sequence[PrefixCache]
) -> Tensor:
    """Raw features [G, c, D] of the sentences of one suffix."""
    rows = tower.embed(suffix.ids)
    for layer, cache in enumerate(caches):
        if layer < len(prompts):
            rows = suffix.insert_prompts(rows, prompts[layer])
        if layer == 0:
            rows = tower.enter(rows, suffix.positions)
        rows = tower.suffix(layer, cache, rows, suffix.buckets, ends_only=layer == tower.depth - 1)
    return suffix.unpack(tower.finish(rows))


def encode_image_with_attention(
    tower: ImageTower, images: Tensor, prompts: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """`encode_image`, and the attention weights [B, heads, n, n] of every block; differentiable, but slower.

    Raises:
        UnsupportedTowerError: the tower is not a vision transformer of standard blocks.

    Example:
        >>> features, attention = encode_image_with_attention(clip.image, torch.zeros(1, 3, 224, 224), [])
        >>> len(attention), attention[0].shape
        (12, torch.Size([1, 12, 197, 197]))
    """
    if tower.obstacle is not None:
        raise UnsupportedTowerError(
            f"the attention of this image tower cannot be read: {tower.obstacle}; heat maps need a CLIP with a vision "
            "transformer, such as ViT-B-16"
        )
    attentions: list[Tensor] = []
    return _encode_embedded(tower, tower.embed(images), prompts, attentions), attentions


def _encode_image(tower: ImageTower, images: Tensor, prompts: Sequence[Tensor]) -> Tensor:
    if tower.obstacle is not None:
        return tower.plain(images)  # without prompts: methods that have some call `require_promptable`
    states = tower.embed(images)
    learns = torch.is_grad_enabled() and any(prompt.requires_grad for prompt in prompts)
    if states.device.type != "cpu" or learns or is_exporting_or_compiling():
        return _encode_embedded(tower, states, prompts)
    # A CPU's caches hold the states of few images; with more, every block would read memory that is not in a cache.
    # With gradients all states are kept anyway.
    at_once = max(_ROWS_AT_ONCE // states.shape[1], 1)
    parts = states.split(at_once)
    each = [prompt.split(at_once) if prompt.ndim == 3 else [prompt] * len(parts) for prompt in prompts]
    return torch.cat([_encode_embedded(tower, part, layers) for part, *layers in zip(parts, *each, strict=True)])


def _encode_embedded(
    tower: ImageTower, states: Tensor, prompts: Sequence[Tensor], attentions: list[Tensor] | None = None
) -> Tensor:
    """Raw features [B, D] of embedded images [B, 1 + N, Hv]; each block's attention is appended to `attentions`."""
    count = states.shape[1]
    for layer in range(tower.depth):
        if layer == 0:
            states = tower.enter(append_vision(states, prompts[0]) if prompts else states)
        elif layer < len(prompts):
            states = replace_vision(states, prompts[layer])
        if attentions is None:
            last = layer == tower.depth - 1
            states = tower.block(layer, states, first_row_only=last and tower.pools_class_token)
        else:
            states, attention = tower.block_with_attention(layer, states)
            attentions.append(attention)
    return tower.finish(states[:, :count])


def to_float32(features: Tensor) -> Tensor:
    """Features in float32; float64 is kept.

    Example:
        >>> to_float32(torch.ones(2, dtype=torch.float16)).dtype
        torch.float32
    """
    return features if features.dtype.itemsize > 2 else features.float()


def l2_normalize(features: Tensor) -> Tensor:
    """L2-normalise features [..., D], in float32; float64 is kept.

    Example:
        >>> l2_normalize(torch.tensor([3.0, 4.0]))
        tensor([0.6000, 0.8000])
    """
    return F.normalize(to_float32(features), dim=-1)
