"""The block loop for text and images: plain CLIP with the edits of a method, block by block."""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from maple.clip import ImageTower, TextTower
from maple.clip.cpu_linear import is_exporting_or_compiling
from maple.clip.edits import NO_EDIT, LayerEdit, edits_of_all_blocks
from maple.clip.towers.blocks import PrefixCache
from maple.distributed import device_memory
from maple.errors import UnsupportedTowerError
from maple.prompts.passes import run_or_defer
from maple.prompts.splice import PackedSuffix, Sentences, insert_text, write_rows

# Per row and block, in widths of the tower: inputs of the norms, queries, keys, values, attention, four of the MLP.
_STATES_PER_ROW = 12

# Rows of image states that go through the blocks together on a CPU without gradients: eight images of ViT-B/16.
_ROWS_AT_ONCE = 1600


def encode_text(
    tower: TextTower, sentences: Sentences, edits: Sequence[LayerEdit], memory_limit: int | None = None
) -> Tensor:
    """Encode sentences with a method's edits of the blocks: raw text features [C, D].

    The common prefix of all sentences (SOS, tokens, shared prompts, shared words) is computed once, and their suffixes,
    packed almost without padding, attend to it; in the last block only the EOT rows are computed. Under a causal mask
    this changes the result by rounding only. Where edits draw random numbers, or the tower is not causal, every row of
    every sentence is computed.

    Args:
        edits: the edit of layer k changes block k; blocks after the last edit are unchanged. With G prompts the result
            is [G, C, D].
        memory_limit: bytes, about, that the states of the suffixes may take; beyond it they are computed in pieces,
            and recomputed for the gradient. By default a quarter of the device's memory.

    Example:
        >>> sentences = write_sentences(clip, ["cat", "dog"], prompt_length=2)
        >>> encode_text(clip.text, sentences, prompt_edits([torch.zeros(2, clip.text.width)])).shape
        torch.Size([2, 512])
    """
    request = _TextPass(tower, sentences, tuple(edits), memory_limit)
    # Fixed sentences are encoded once, and a changed block is the block of one run: there is nothing to share.
    return run_or_defer(request) if edits and _only_prompts(edits) else request.run()


def encode_image(tower: ImageTower, images: Tensor, edits: Sequence[LayerEdit]) -> Tensor:
    """Encode images [B, 3, R, R]: raw image features [B, D]; those of plain CLIP without edits.

    Args:
        edits: the edit of layer k changes block k; blocks after the last edit are unchanged.

    Example:
        >>> edits = prompt_edits([torch.zeros(2, clip.image.width)])
        >>> encode_image(clip.image, torch.zeros(1, 3, 224, 224), edits).shape
        torch.Size([1, 512])
    """
    request = _ImagePass(tower, images, tuple(edits))
    return run_or_defer(request) if _only_prompts(edits) else request.run()


def encode_image_and_tokens(tower: ImageTower, images: Tensor, edits: Sequence[LayerEdit]) -> tuple[Tensor, Tensor]:
    """`encode_image`, and the rows of the edits' `tokens` after the final norm: [B, D] and [B, K, Hv].

    Example:
        >>> edits = [LayerEdit(), LayerEdit(tokens=torch.zeros(5, clip.image.width))]
        >>> encode_image_and_tokens(clip.image, torch.zeros(1, 3, 224, 224), edits)[1].shape
        torch.Size([1, 5, 768])
    """
    rows: list[Tensor] = []
    features = _encode_image(tower, images, edits, token_rows=rows)
    return features, torch.cat(rows)


def _only_prompts(edits: Sequence[LayerEdit]) -> bool:
    return all(edit.only_prompts for edit in edits)


@dataclass(frozen=True, eq=False)
class _TextPass:
    tower: TextTower
    sentences: Sentences
    edits: tuple[LayerEdit, ...]
    memory_limit: int | None

    @cached_property
    def _grouped(self) -> list[Tensor | None]:
        """The prompts as G of them: [G, 1, P, Ht] or [G, C, P, Ht]."""
        prompts = (edit.prompt for edit in self.edits)
        return [None if prompt is None else prompt[(None,) * (4 - prompt.ndim)] for prompt in prompts]

    @property
    def batch_key(self) -> Hashable:
        shapes = tuple(prompt is not None and (prompt.shape[1:], prompt.dtype) for prompt in self._grouped)
        return self.tower, self.sentences.content, shapes, self.memory_limit

    def run(self) -> Tensor:
        return _encode_text(self.tower, self.sentences, self.edits, self.memory_limit)

    def run_batch(self, others: Sequence["_TextPass"]) -> list[Tensor]:
        passes = (self, *others)
        edits = _joined(zip(*(request._grouped for request in passes), strict=True))
        features = _encode_text(self.tower, self.sentences, edits, self.memory_limit)
        sizes = [next(len(prompt) for prompt in request._grouped if prompt is not None) for request in passes]
        return [
            part
            if any(edit.prompt is not None and edit.prompt.ndim == 4 for edit in request.edits)
            else part.squeeze(0)
            for request, part in zip(passes, features.split(sizes), strict=True)
        ]


@dataclass(frozen=True, eq=False)
class _ImagePass:
    tower: ImageTower
    images: Tensor
    edits: tuple[LayerEdit, ...]

    @property
    def batch_key(self) -> Hashable:
        prompts = (edit.prompt for edit in self.edits)
        shapes = tuple(prompt is not None and (prompt.shape[-2:], prompt.dtype) for prompt in prompts)
        return self.tower, self.images.shape[1:], self.images.dtype, shapes

    def run(self) -> Tensor:
        return _encode_image(self.tower, self.images, self.edits)

    def run_batch(self, others: Sequence["_ImagePass"]) -> list[Tensor]:
        passes = (self, *others)
        counts = [len(request.images) for request in passes]
        prompts = (
            [None if edit.prompt is None else edit.prompt.expand(count, -1, -1) for edit in request.edits]
            for request, count in zip(passes, counts, strict=True)
        )
        images = torch.cat([request.images for request in passes])
        return list(_encode_image(self.tower, images, _joined(zip(*prompts, strict=True))).split(counts))


def _joined(layers: Iterable[tuple[Tensor | None, ...]]) -> list[LayerEdit]:
    """Edits with the prompts of several passes: in each layer, either all of them have one or none has."""
    prompts = ([prompt for prompt in layer if prompt is not None] for layer in layers)
    return [LayerEdit(prompt=torch.cat(layer)) if layer else NO_EDIT for layer in prompts]


def _learns(edits: Sequence[LayerEdit]) -> bool:
    """Whether a gradient may be needed of these edits."""
    return torch.is_grad_enabled() and any(
        not edit.only_prompts or (edit.prompt is not None and edit.prompt.requires_grad) for edit in edits
    )


def _encode_text(
    tower: TextTower, sentences: Sentences, edits: Sequence[LayerEdit], memory_limit: int | None
) -> Tensor:
    layers = edits_of_all_blocks(edits, tower.depth)
    prompts = [edit.prompt for edit in edits if edit.prompt is not None]
    groups = [len(prompt) for prompt in prompts if prompt.ndim == 4]
    for_gradient = _learns(edits)
    limit = device_memory(sentences.ids.device) // 4 if memory_limit is None else memory_limit
    row_bytes = _STATES_PER_ROW * tower.width * tower.dtype.itemsize * (tower.depth if for_gradient else 1)
    most_rows = max(limit // row_bytes, 1)
    if not tower.is_causal or any(edit.is_random for edit in edits):
        if not groups:
            return _encode_each(tower, sentences, layers, most_rows)
        each = ([_part(edit, slice(group, group + 1)) for edit in layers] for group in range(groups[0]))
        return torch.stack([_encode_each(tower, sentences, part, most_rows) for part in each])
    # A prompt per sentence cannot be in a shared prefix: then only SOS is.
    per_sentence = any(prompt.ndim == 3 or (prompt.ndim == 4 and prompt.shape[1] > 1) for prompt in prompts)
    split = sentences.split(groups[0] if groups else 1, 1 if per_sentence else sentences.shared, most_rows)
    states, caches, inserted = tower.embed(split.prefix_ids), [], 0
    for layer, edit in enumerate(layers):
        insert = partial(split.insert_prompts, inserted=inserted)
        states = edit.enter(states, insert, tower.enter if layer == 0 else None, residual_first=True)
        if edit.tokens is not None:  # a part of the prefix: under the causal mask they see the first token alone
            states = write_rows(states, edit.tokens, 1, inserted, edit.keep)
            inserted = len(edit.tokens)
        cache, states = tower.prefix(layer, states, edit, cache_only=layer == tower.depth - 1)
        caches.append(cache)
    features = []
    for suffix in split.suffixes:
        if for_gradient and len(split.suffixes) > 1:  # keep the states of one piece at a time, recompute the others
            features.append(checkpoint(_encode_suffix, tower, suffix, layers, caches, use_reentrant=False))
        else:
            features.append(_encode_suffix(tower, suffix, layers, caches))
    by_class = torch.cat(features, dim=1)[:, split.order]
    return by_class if groups else by_class[0]


def _encode_suffix(
    tower: TextTower, suffix: PackedSuffix, layers: Sequence[LayerEdit], caches: Sequence[PrefixCache]
) -> Tensor:
    """Raw features [G, c, D] of the sentences of one suffix."""
    rows = tower.embed(suffix.ids)
    for layer, (edit, cache) in enumerate(zip(layers, caches, strict=True)):
        add_positions = partial(tower.enter, positions=suffix.positions) if layer == 0 else None
        rows = edit.enter(rows, suffix.insert_prompts, add_positions, residual_first=True)
        rows = tower.suffix(layer, cache, rows, suffix.buckets, edit, ends_only=layer == tower.depth - 1)
    return suffix.unpack(tower.finish(rows))


def _encode_each(tower: TextTower, sentences: Sentences, layers: Sequence[LayerEdit], most_rows: int) -> Tensor:
    """Raw features [C, D], every row computed for each sentence, as many sentences at a time as `most_rows` permits."""
    count, length = sentences.ids.shape
    at_once = max(most_rows // length, 1)
    features = []
    for start in range(0, count, at_once):
        part = slice(start, start + at_once)
        edits = [_part(edit, part) for edit in layers]
        arguments = tower, sentences.ids[part], sentences.slots[part], edits
        if torch.is_grad_enabled() and at_once < count:
            # The state of the random generator is restored for the second computation.
            features.append(checkpoint(_encode_rows, *arguments, use_reentrant=False))
        else:
            features.append(_encode_rows(*arguments))
    return torch.cat(features)


def _encode_rows(tower: TextTower, ids: Tensor, slots: Tensor, layers: Sequence[LayerEdit]) -> Tensor:
    states, inserted = tower.embed(ids), 0
    mask, enter = tower.mask(ids), partial(tower.enter, positions=tower.positions(ids))
    for layer, edit in enumerate(layers):
        insert = partial(insert_text, slots=torch.where(slots > 0, slots + inserted, slots))
        states = edit.enter(states, insert, enter if layer == 0 else None, residual_first=True)
        if edit.tokens is not None:
            states = write_rows(states, edit.tokens, 1, inserted, edit.keep)
            inserted = len(edit.tokens)
            mask = tower.mask(ids, inserted)
        states = tower.block(layer, states, edit, mask)
    if inserted:
        states = torch.cat([states[:, :1], states[:, 1 + inserted :]], dim=1)
    return tower.finish(tower.pool(states, ids))


def _part(edit: LayerEdit, part: slice) -> LayerEdit:
    """The edit for some of the images or sentences, if each has a prompt of its own; for one group of several."""
    prompt = edit.prompt
    if prompt is None or prompt.ndim == 2 or (prompt.ndim == 3 and len(prompt) == 1):
        return edit
    return replace(edit, prompt=prompt[part].flatten(0, -3))


def encode_image_with_attention(
    tower: ImageTower,
    images: Tensor,
    edits: Sequence[LayerEdit],
    token_rows: list[Tensor] | None = None,
    final_states: list[Tensor] | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """`encode_image`, and the attention weights [B, heads, n, n] of every block; differentiable, but slower.

    The rows of the edits' tokens after the final norm, [B, K, Hv], are appended to `token_rows`, and the states
    that are pooled, [B, n, Hv], to `final_states`.

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
    return _encode_embedded(tower, tower.embed(images), edits, token_rows, attentions, final_states), attentions


def _encode_image(
    tower: ImageTower, images: Tensor, edits: Sequence[LayerEdit], token_rows: list[Tensor] | None = None
) -> Tensor:
    if tower.obstacle is not None:
        return tower.plain(images)  # without edits: methods that have some call `require_promptable`
    states = tower.embed(images)
    if states.device.type != "cpu" or _learns(edits) or is_exporting_or_compiling():
        return _encode_embedded(tower, states, edits, token_rows)
    # A CPU's caches hold the states of few images; with more, every block would read memory that is not in a cache.
    # With gradients all states are kept anyway.
    at_once = max(_ROWS_AT_ONCE // states.shape[1], 1)
    features = []
    for number, part in enumerate(states.split(at_once)):
        images_of_part = slice(number * at_once, number * at_once + len(part))
        features.append(_encode_embedded(tower, part, [_part(edit, images_of_part) for edit in edits], token_rows))
    return torch.cat(features)


def _encode_embedded(
    tower: ImageTower,
    states: Tensor,
    edits: Sequence[LayerEdit],
    token_rows: list[Tensor] | None = None,
    attentions: list[Tensor] | None = None,
    final_states: list[Tensor] | None = None,
) -> Tensor:
    """Raw features [B, D] of embedded images [B, 1 + N, Hv]; what the lists are for is appended to them."""
    count, prompted, inserted = states.shape[1], 0, 0
    for layer, edit in enumerate(edits_of_all_blocks(edits, tower.depth)):
        insert = partial(write_rows, start=count, replaced=prompted)
        states = edit.enter(states, insert, tower.enter if layer == 0 else None, residual_first=False)
        prompted = prompted if edit.prompt is None else edit.prompt.shape[-2]
        if edit.tokens is not None:
            states = write_rows(states, edit.tokens, count + prompted, inserted, edit.keep)
            inserted = len(edit.tokens)
        if attentions is None:
            last = layer == tower.depth - 1 and token_rows is None
            states = tower.block(layer, states, edit, first_row_only=last and tower.pools_class_token)
        else:
            states, attention = tower.block_with_attention(layer, states, edit)
            attentions.append(attention)
    if token_rows is not None:
        rows = states[:, count + prompted : count + prompted + inserted]
        token_rows.append(tower.finish_tokens(rows) if inserted else rows)
    states = states[:, :count]
    if final_states is not None:
        final_states.append(states)
    return tower.finish(states)


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
