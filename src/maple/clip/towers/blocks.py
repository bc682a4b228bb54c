"""A residual attention block that can compute queries for some rows only, and attend to cached keys and values.

The arithmetic is that of open_clip's or timm's block: the same weights, norms and order, so results agree up to
rounding. Blocks of another structure run as they are, through the same calls, without the savings.

Source: open_clip `ResidualAttentionBlock` (transformer.py); CLIP (Radford et al., 2021), section 2.4. `block_parts.py`
names what is read of each library's blocks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from maple.clip.cpu_linear import frozen_linear
from maple.clip.edits import NO_EDIT, Affine, LayerEdit
from maple.clip.towers.block_parts import OpenClipParts, first_norm, parts_of
from maple.errors import UnsupportedTowerError

if TYPE_CHECKING:
    from maple.clip.towers.timm_parts import Rotation

Mask = Callable[[int], Tensor]
"""A function from n to the additive causal mask [n, n]. Standard blocks do not need it."""

# What later rows attend to: keys and values [G, heads, S, H / heads], or the input of a block that runs as it is.
PrefixCache = tuple[Tensor, ...]


@dataclass(frozen=True)
class Bucket:
    """Consecutive packed rows, from `start`: G groups of n sentences of similar length, padded to t rows each.

    Attributes:
        groups, count, length: G, n and t.
        ends: [n] int64, the row (from 0) at which each sentence ends; the rows after it are padding.
        even: whether there is no padding.
    """

    start: int
    groups: int
    count: int
    length: int
    ends: Tensor
    even: bool

    @property
    def sentences(self) -> int:
        """G * n."""
        return self.groups * self.count

    def rows(self, packed: Tensor) -> Tensor:
        """The bucket's rows of packed [R, ...]: [G * n, t, ...]."""
        rows = packed[self.start : self.start + self.sentences * self.length]
        return rows.view(-1, self.length, *packed.shape[1:])

    def last_rows(self) -> Tensor:
        """The packed row at which each of its sentences ends: [G * n]."""
        starts = torch.arange(self.sentences, device=self.ends.device) * self.length + self.start
        return starts + self.ends.repeat(self.groups)


class Block:
    """A block of a transformer, of width H; states are [N, n, H].

    Args:
        module: the block of open_clip or timm.
        rotation: rotary positions of the image patches; None for none.

    Attributes:
        is_standard: whether its norms and the linear layers of its attention can be changed.
        peculiarity: what its block has instead, for messages; "" for a standard one.
    """

    def __init__(self, module: Any, rotation: "Rotation | None" = None) -> None:
        self.module = module
        self._rotation = rotation
        parts = parts_of(module)
        self.is_standard = not isinstance(parts, str)
        self.peculiarity = parts if isinstance(parts, str) else ""
        self._parts = cast(OpenClipParts, parts)

    @property
    def norms(self) -> tuple[Affine, Affine]:
        """Weights and biases of the norms before the attention and before the MLP, of a standard block."""
        first, second = self._parts.norms
        return (first.weight, first.bias), (second.weight, second.bias)

    @property
    def first_norm(self) -> Any:
        """The norm of the block's input; None where norms follow the layers, or there are several."""
        return first_norm(self.module)

    def multiply_adds(self, rows: int, width: int) -> int:
        """Multiply-adds on `rows` states of `width` channels: products of the weights, and of the attention."""
        weights: int = sum(weight.numel() for weight in self.module.parameters() if weight.ndim in (2, 4))
        return rows * weights + 2 * rows**2 * width

    def causal(self, states: Tensor, mask: Mask, edit: LayerEdit = NO_EDIT) -> Tensor:
        """Causal attention: [N, n, H]."""
        if not self.is_standard:
            return self._as_is(states, mask(states.shape[1]), edit)
        normed = self._norm(0, states, edit)
        query, key, value = self._project(normed, edit)
        return self._after_attention(states, normed, attend(query, key, value, causal=True), edit)

    def full(
        self,
        states: Tensor,
        edit: LayerEdit = NO_EDIT,
        first_row_only: bool = False,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Full attention: [N, n, H], or the output of the first row alone, [N, 1, H].

        `mask` [N or 1, 1, 1 or n, n] is true where a row attends to another; standard blocks alone know it.
        """
        if not self.is_standard:
            states = self._as_is(states, None, edit)
            return states[:, :1] if first_row_only else states
        normed = self._norm(0, states, edit)
        if first_row_only:  # the last block of a tower that pools the class token: the other rows are never read
            (query,), (key, value) = self._project(normed[:, :1], edit, "q"), self._project(normed, edit, "kv")
            states, normed = states[:, :1], normed[:, :1]
        else:
            query, key, value = self._project(normed, edit)
        if self._rotation is not None:  # a class token has no rotary position
            query, key = query if first_row_only else self._rotation(query), self._rotation(key)
        return self._after_attention(states, normed, attend(query, key, value, mask), edit)

    def full_with_attention(self, states: Tensor, edit: LayerEdit = NO_EDIT) -> tuple[Tensor, Tensor]:
        """`full`, and its attention weights: [N, n, H] and [N, heads, n, n], whose rows sum to 1.

        Slower than `full`, which never stores these weights. For standard blocks only.
        """
        normed = self._norm(0, states, edit)
        query, key, value = self._project(normed, edit)
        if self._rotation is not None:
            query, key = self._rotation(query), self._rotation(key)
        weights = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(dim=-1)
        return self._after_attention(states, normed, weights @ value, edit), weights

    def prefix(
        self, states: Tensor, mask: Mask, edit: LayerEdit = NO_EDIT, cache_only: bool = False
    ) -> tuple[PrefixCache, Tensor]:
        """The keys and values that rows after `states` [G, S, H] attend to, and the block's output, [G, S, H].

        With `cache_only` the states are returned unchanged: after the last block nothing reads them.
        """
        if not self.is_standard:
            return (states,), states if cache_only else self._as_is(states, mask(states.shape[1]), edit)
        normed = self._norm(0, states, edit)
        if cache_only:
            key, value = self._project(normed, edit, "kv")
            return (key, value), states
        query, key, value = self._project(normed, edit)
        return (key, value), self._after_attention(states, normed, attend(query, key, value, causal=True), edit)

    def suffix(
        self,
        cache: PrefixCache,
        rows: Tensor,
        buckets: Sequence[Bucket],
        mask: Mask,
        edit: LayerEdit = NO_EDIT,
        ends_only: bool = False,
    ) -> Tensor:
        """The block on packed sentence ends: each attends to its group's prefix and, causally, to its own rows.

        Norms and projections run on all packed rows at once; only the attention goes bucket by bucket.

        Args:
            cache: what `prefix` returned, for G groups.
            rows: [R, H], bucket by bucket; so is the result.
            ends_only: compute only the EOT row of each sentence: [sentences, H].
        """
        if not self.is_standard:
            return self._suffix_as_is(cache[0], rows, buckets, mask, edit, ends_only)
        normed = self._norm(0, rows, edit)
        attended = []
        if ends_only:
            last = torch.cat([bucket.last_rows() for bucket in buckets])
            keys_values = self._linear(normed, edit, "kv")
            rows, normed = rows[last], normed[last]
            queries = self._linear(normed, edit, "q")
        else:
            packed = self._linear(normed, edit, "qkv")
            queries, keys_values = packed[:, : rows.shape[1]], packed[:, rows.shape[1] :]
        done = 0
        for bucket in buckets:
            key, value = self._split_heads(bucket.rows(keys_values), "kv")
            key = torch.cat([_per_sentence(cache[0], bucket.count), key], dim=2)
            value = torch.cat([_per_sentence(cache[1], bucket.count), value], dim=2)
            if ends_only:
                query = self._split_heads(queries[done : done + bucket.sentences, None], "q")[0]
                done += bucket.sentences
            else:
                query = self._split_heads(bucket.rows(queries), "q")[0]
            allowed = _suffix_mask(bucket, key.shape[2] - bucket.length, ends_only)
            attended.append(_merge_heads(attend(query, key, value, allowed)).flatten(0, 1))
        return self._after_attention(rows, normed, torch.cat(attended), edit)

    def _norm(self, which: int, states: Tensor, edit: LayerEdit) -> Tensor:
        """The norm before the attention (0) or before the MLP (1), with the affine parameters of the edit, if any."""
        norm = self._parts.norms[which]
        affine = edit.norms[which]
        if affine is None:
            return cast(Tensor, norm(states))
        weight, bias = affine
        wide = torch.promote_types(states.dtype, weight.dtype)
        normed = F.layer_norm(states.to(wide), norm.normalized_shape, weight.to(wide), bias.to(wide), norm.eps)
        return normed.to(states.dtype)

    def _project(self, normed: Tensor, edit: LayerEdit, kinds: str = "qkv") -> tuple[Tensor, ...]:
        """Queries, keys and values, as `kinds` says, of [N, n, H]: [N, heads, n, H / heads] each."""
        if self._parts.packed:
            return self._split_heads(self._linear(normed, edit, kinds), kinds)
        return tuple(self._split_heads(self._linear(normed, edit, kind), kind)[0] for kind in kinds)

    def _linear(self, normed: Tensor, edit: LayerEdit, kinds: str) -> Tensor:
        """The packed projection `kinds`, consecutive ones of q, k, v, with low-rank updates: [..., kinds * H]."""
        if not self._parts.packed and len(kinds) > 1:
            return torch.cat([self._linear(normed, edit, kind) for kind in kinds], dim=-1)
        packed = frozen_linear(normed, *self._parts.projection(kinds))
        updates = {kinds.index(kind): update for kind, update in edit.low_rank.items() if kind in kinds}
        if not updates:
            return packed
        parts = packed.split(normed.shape[-1], dim=-1)
        return torch.cat(
            [each + updates[number](normed) if number in updates else each for number, each in enumerate(parts)], dim=-1
        )

    def _split_heads(self, packed: Tensor, kinds: str) -> tuple[Tensor, ...]:
        """Queries, keys and values, as `kinds` says, by heads, each with its norm if it has one."""
        parts = self._parts
        split = packed.view(*packed.shape[:2], len(kinds), parts.head_count, parts.head_width)
        heads = split.permute(2, 0, 3, 1, 4).unbind(0)
        if not parts.head_norms:
            return heads
        return tuple(
            parts.head_norms[kind](each).to(each.dtype) if kind in parts.head_norms else each
            for kind, each in zip(kinds, heads, strict=True)
        )

    def _after_attention(self, states: Tensor, normed: Tensor, attended: Tensor, edit: LayerEdit) -> Tensor:
        """The output projection, the MLP, both residual connections, and that of the edit.

        Args:
            states, normed: the block's input, [..., H], and its first norm.
            attended: its attention by heads, [N, heads, n, H / heads], or joined, [..., H].
        """
        parts = self._parts
        joined = parts.before_output(attended if attended.ndim == states.ndim else _merge_heads(attended))
        attention = frozen_linear(joined, *parts.output)
        if "o" in edit.low_rank:
            attention = attention + edit.low_rank["o"](joined)
        states = states + parts.scale(0, attention)
        states = states + parts.scale(1, parts.mlp(self._norm(1, states, edit)))
        return states if edit.residual is None else states + edit.residual(normed)

    def _as_is(self, states: Tensor, mask: Tensor | None, edit: LayerEdit) -> Tensor:
        if edit.is_inside:
            raise UnsupportedTowerError(
                "this CLIP has blocks that are not standard attention blocks, whose projections and norms cannot be "
                "changed; use a backbone such as ViT-B-16, or a method that learns tokens or adapters"
            )
        options: dict[str, Tensor] = {} if mask is None else {"attn_mask": mask}
        if self._rotation is not None:
            options["rope"] = self._rotation.of_rows(states.shape[1])
        output = cast(Tensor, self.module(states, **options))
        if edit.residual is None:
            return output
        norm = self.first_norm
        if norm is None:
            raise UnsupportedTowerError(
                "this CLIP has blocks that do not begin with a norm of their input, to which adapters belong; use a "
                "backbone such as ViT-B-16, or a method that learns tokens"
            )
        return output + edit.residual(norm(states))

    def _suffix_as_is(
        self, prefix: Tensor, rows: Tensor, buckets: Sequence[Bucket], mask: Mask, edit: LayerEdit, ends_only: bool
    ) -> Tensor:
        shared, outputs = prefix.shape[1], []
        for bucket in buckets:
            states = torch.cat([_per_sentence(prefix, bucket.count), bucket.rows(rows)], dim=1)
            states = self._as_is(states, mask(states.shape[1]), edit)[:, shared:]
            if ends_only:
                states = states[torch.arange(len(states), device=states.device), bucket.ends.repeat(bucket.groups)]
            outputs.append(states if ends_only else states.flatten(0, 1))
        return torch.cat(outputs)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *, causal: bool = False) -> Tensor:
    """Scaled dot-product attention of [N, heads, n, d] over [N, heads, m, d]; `mask` is true where a row may attend."""
    # On a CPU in bfloat16, PyTorch's fused kernel takes four times as long as two matrix products.
    if query.device.type != "cpu" or query.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)
    scores = query * query.shape[-1] ** -0.5 @ key.transpose(-2, -1)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return cast(Tensor, scores.softmax(dim=-1) @ value)


def _suffix_mask(bucket: Bucket, shared: int, ends_only: bool) -> Tensor | None:
    """Which of the prefix's and its own rows each query of a bucket attends to; None for all of them."""
    device = bucket.ends.device
    if not ends_only:
        return torch.ones(bucket.length, shared + bucket.length, dtype=torch.bool, device=device).tril(shared)
    if bucket.even:
        return None
    mask = torch.arange(shared + bucket.length, device=device) <= (shared + bucket.ends)[:, None]
    return mask.repeat(bucket.groups, 1)[:, None, None]


def _per_sentence(shared: Tensor, count: int) -> Tensor:
    """Repeat [G, ...] for each of the `count` sentences of a group: [G * count, ...]."""
    return shared[:, None].expand(-1, count, *shared.shape[1:]).flatten(0, 1)


def _merge_heads(attended: Tensor) -> Tensor:
    """[N, heads, n, d] -> [N, n, heads * d]."""
    return attended.transpose(1, 2).flatten(2)
