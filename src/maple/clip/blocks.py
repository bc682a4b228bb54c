"""A residual attention block that can compute queries for some rows only, and attend to cached keys and values.

The arithmetic is that of open_clip's block: the same weights, norms and order, so results agree up to rounding. Blocks
of another structure run as they are, through the same calls, without the savings.

Source: open_clip `ResidualAttentionBlock` (transformer.py); CLIP (Radford et al., 2021), section 2.4.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from open_clip.transformer import QuickGELU, ResidualAttentionBlock
from torch import Tensor, nn

from maple.clip.cpu_linear import frozen_linear

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
    """A block of an open_clip transformer, of width H; states are [N, n, H]."""

    def __init__(self, module: Any) -> None:
        self.module = module
        attention = getattr(module, "attn", None)
        self.is_standard = (
            type(module) is ResidualAttentionBlock
            and type(attention) is nn.MultiheadAttention
            and attention.in_proj_weight is not None
            and attention.bias_k is None
            and not attention.add_zero_attn
            and not hasattr(module, "ln_1_kv")
        )
        layers = list(module.mlp) if self.is_standard else []
        self._plain_mlp = len(layers) == 3 and type(layers[0]) is type(layers[2]) is nn.Linear

    def causal(self, states: Tensor, mask: Tensor) -> Tensor:
        """Causal attention: [N, n, H]. `mask` [n, n] is additive."""
        if not self.is_standard:
            return self._as_is(states, mask)
        query, key, value = self._project(self.module.ln_1(states))
        return self._after_attention(states, _merge_heads(attend(query, key, value, causal=True)))

    def full(self, states: Tensor, first_row_only: bool = False) -> Tensor:
        """Full attention: [N, n, H], or the output of the first row alone, [N, 1, H]."""
        if not self.is_standard:
            states = self._as_is(states, None)
            return states[:, :1] if first_row_only else states
        normed = self.module.ln_1(states)
        if first_row_only:  # the last block of a tower that pools the class token: the other rows are never read
            (query,), (key, value) = self._project(normed[:, :1], 0, 1), self._project(normed, 1, 3)
            states = states[:, :1]
        else:
            query, key, value = self._project(normed)
        return self._after_attention(states, _merge_heads(attend(query, key, value)))

    def full_with_attention(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """`full`, and its attention weights: [N, n, H] and [N, heads, n, n], whose rows sum to 1.

        Slower than `full`, which never stores these weights. For standard blocks only.
        """
        query, key, value = self._project(self.module.ln_1(states))
        weights = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(dim=-1)
        return self._after_attention(states, _merge_heads(weights @ value)), weights

    def prefix(self, states: Tensor, mask: Tensor, cache_only: bool = False) -> tuple[PrefixCache, Tensor]:
        """The keys and values that rows after `states` [G, S, H] attend to, and the block's output, [G, S, H].

        With `cache_only` the states are returned unchanged: after the last block nothing reads them.
        """
        if not self.is_standard:
            return (states,), states if cache_only else self._as_is(states, mask)
        normed = self.module.ln_1(states)
        if cache_only:
            key, value = self._project(normed, 1, 3)
            return (key, value), states
        query, key, value = self._project(normed)
        return (key, value), self._after_attention(states, _merge_heads(attend(query, key, value, causal=True)))

    def suffix(
        self, cache: PrefixCache, rows: Tensor, buckets: Sequence[Bucket], mask: Tensor, ends_only: bool = False
    ) -> Tensor:
        """The block on packed sentence ends: each attends to its group's prefix and, causally, to its own rows.

        Norms and projections run on all packed rows at once; only the attention goes bucket by bucket.

        Args:
            cache: what `prefix` returned, for G groups.
            rows: [R, H], bucket by bucket; so is the result.
            mask: [T, T] additive and causal, T >= S + the longest bucket.
            ends_only: compute only the EOT row of each sentence: [sentences, H].
        """
        if not self.is_standard:
            return self._suffix_as_is(cache[0], rows, buckets, mask, ends_only)
        normed = self.module.ln_1(rows)
        attended = []
        if ends_only:
            last = torch.cat([bucket.last_rows() for bucket in buckets])
            rows, queries = rows[last], self._linear(normed[last], 0, 1)
            keys_values = self._linear(normed, 1, 3)
        else:
            packed = self._linear(normed, 0, 3)
            queries, keys_values = packed[:, : rows.shape[1]], packed[:, rows.shape[1] :]
        done = 0
        for bucket in buckets:
            key, value = self._split_heads(bucket.rows(keys_values), 2)
            key = torch.cat([_per_sentence(cache[0], bucket.count), key], dim=2)
            value = torch.cat([_per_sentence(cache[1], bucket.count), value], dim=2)
            if ends_only:
                query = self._split_heads(queries[done : done + bucket.sentences, None], 1)[0]
                done += bucket.sentences
            else:
                query = self._split_heads(bucket.rows(queries), 1)[0]
            allowed = _suffix_mask(bucket, key.shape[2] - bucket.length, ends_only)
            attended.append(_merge_heads(attend(query, key, value, allowed)).flatten(0, 1))
        return self._after_attention(rows, torch.cat(attended))

    def _project(self, normed: Tensor, first: int = 0, last: int = 3) -> tuple[Tensor, ...]:
        """Queries (0), keys (1) and values (2), from `first` up to `last`, of [N, n, H]: [N, heads, n, H / heads]."""
        return self._split_heads(self._linear(normed, first, last), last - first)

    def _linear(self, normed: Tensor, first: int, last: int) -> Tensor:
        attention, width = self.module.attn, normed.shape[-1]
        part = slice(first * width, last * width)
        bias = attention.in_proj_bias
        return frozen_linear(normed, attention.in_proj_weight[part], None if bias is None else bias[part])

    def _split_heads(self, packed: Tensor, kinds: int) -> tuple[Tensor, ...]:
        attention = self.module.attn
        split = packed.view(*packed.shape[:2], kinds, attention.num_heads, attention.head_dim)
        return split.permute(2, 0, 3, 1, 4).unbind(0)

    def _after_attention(self, states: Tensor, joined: Tensor) -> Tensor:
        """The output projection, the MLP, and both residual connections."""
        module = self.module
        states = states + module.ls_1(frozen_linear(joined, module.attn.out_proj.weight, module.attn.out_proj.bias))
        normed = module.ln_2(states)
        if self._plain_mlp:
            first, activation, second = module.mlp
            hidden = frozen_linear(normed, first.weight, first.bias)
            # QuickGELU is x * sigmoid(a x). As SiLU it is one kernel that keeps one tensor for the gradient.
            quick = type(activation) is QuickGELU
            hidden = F.silu(1.702 * hidden) / 1.702 if quick else activation(hidden)
            hidden = frozen_linear(hidden, second.weight, second.bias)
        else:
            hidden = module.mlp(normed)
        return cast(Tensor, states + module.ls_2(hidden))

    def _as_is(self, states: Tensor, mask: Tensor | None) -> Tensor:
        return cast(Tensor, self.module(states) if mask is None else self.module(states, attn_mask=mask))

    def _suffix_as_is(
        self, prefix: Tensor, rows: Tensor, buckets: Sequence[Bucket], mask: Tensor, ends_only: bool
    ) -> Tensor:
        shared, outputs = prefix.shape[1], []
        for bucket in buckets:
            states = torch.cat([_per_sentence(prefix, bucket.count), bucket.rows(rows)], dim=1)
            length = states.shape[1]
            states = self._as_is(states, mask[:length, :length])[:, shared:]
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
