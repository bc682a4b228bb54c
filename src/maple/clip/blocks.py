"""One residual attention block, open inside: queries of some rows only, keys and values of states seen elsewhere.

The arithmetic is that of the block it is made of: the same weights, norms and order, so results agree up to rounding.
Blocks that are built otherwise run whole, through the same calls, without the savings.

Source: open_clip `ResidualAttentionBlock` (transformer.py); CLIP (Radford et al., 2021), section 2.4.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.transformer import QuickGELU, ResidualAttentionBlock
from torch import Tensor, nn

from maple.clip.cpu_linear import frozen_linear

# What later rows attend to: keys and values [G, heads, S, H / heads], or, of a block that runs whole, its input.
Memory = tuple[Tensor, ...]


@dataclass(frozen=True)
class Bucket:
    """Sentences of about one length among packed rows: G groups of them, sentence by sentence.

    Attributes:
        start: the first row.
        groups: G. count: n, the sentences of each group. length: t, the rows of each sentence.
        ends: [n] int64, at which of its rows each sentence ends; what follows there is never read.
        even: whether all of them end at their last row.
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
        """Its rows of packed [R, ...]: [G * n, t, ...]."""
        own = packed[self.start : self.start + self.sentences * self.length]
        return own.view(-1, self.length, *packed.shape[1:])

    def last_rows(self) -> Tensor:
        """Where its sentences end among the packed rows: [G * n]."""
        starts = torch.arange(self.sentences, device=self.ends.device) * self.length + self.start
        return starts + self.ends.repeat(self.groups)


class Block:
    """Block of a tower of width H; states are [N, n, H]."""

    def __init__(self, module: Any) -> None:
        self.module = module
        attention = getattr(module, "attn", None)
        self.is_open = (
            type(module) is ResidualAttentionBlock
            and type(attention) is nn.MultiheadAttention
            and attention.in_proj_weight is not None
            and attention.bias_k is None
            and not attention.add_zero_attn
            and not hasattr(module, "ln_1_kv")
        )
        layers = list(module.mlp) if self.is_open else []
        self._plain_mlp = len(layers) == 3 and type(layers[0]) is type(layers[2]) is nn.Linear

    def causal(self, states: Tensor, mask: Tensor) -> Tensor:
        """Rows attend to themselves and to what comes before; `mask` [n, n] says so additively: [N, n, H]."""
        if not self.is_open:
            return self._whole(states, mask)
        return self._causal(states, *self._project(self.module.ln_1(states)))

    def full(self, states: Tensor, first_row_only: bool = False) -> Tensor:
        """All rows attend to all: [N, n, H], or only the first of them, [N, 1, H]."""
        if not self.is_open:
            states = self._whole(states, None)
            return states[:, :1] if first_row_only else states
        normed = self.module.ln_1(states)
        if first_row_only:
            (query,), (key, value) = self._project(normed[:, :1], 0, 1), self._project(normed, 1, 3)
            states = states[:, :1]
        else:
            query, key, value = self._project(normed)
        return self._rest(states, _joined(attend(query, key, value)))

    def full_with_attention(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """As `full`, and what each row attended to: [N, n, H] and [N, heads, n, n], whose rows sum to 1.

        Slower than `full`, which never holds these weights. Only of an open block.
        """
        query, key, value = self._project(self.module.ln_1(states))
        weights = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(dim=-1)
        return self._rest(states, _joined(weights @ value)), weights

    def prefix(self, states: Tensor, mask: Tensor, memory_only: bool = False) -> tuple[Memory, Tensor]:
        """What rows after `states` [G, S, H] have to know of them, and the causal block's output, [G, S, H].

        With `memory_only` the states come back as they were.
        """
        if not self.is_open:
            return (states,), states if memory_only else self._whole(states, mask)
        normed = self.module.ln_1(states)
        if memory_only:
            key, value = self._project(normed, 1, 3)
            return (key, value), states
        query, key, value = self._project(normed)
        return (key, value), self._causal(states, query, key, value)

    def suffix(
        self, memory: Memory, rows: Tensor, buckets: Sequence[Bucket], mask: Tensor, ends_only: bool = False
    ) -> Tensor:
        """Ends of sentences, packed without padding: each attends to the memory of its group and to its own rows.

        Args:
            memory: of G groups, as `prefix` gives it.
            rows: [R, H], bucket by bucket.
            mask: [T, T] additive and causal, T >= S + the longest bucket.

        Returns:
            [R, H]; with `ends_only` one row of each sentence, bucket by bucket: [sentences, H].
        """
        if not self.is_open:
            return self._whole_sentences(memory[0], rows, buckets, mask, ends_only)
        normed = self.module.ln_1(rows)
        attended = []
        if ends_only:
            last = torch.cat([bucket.last_rows() for bucket in buckets])
            rows, queries = rows[last], self._linear(normed[last], 0, 1)
            own = self._linear(normed, 1, 3)
        else:
            packed = self._linear(normed, 0, 3)
            queries, own = packed[:, : rows.shape[1]], packed[:, rows.shape[1] :]
        done = 0
        for bucket in buckets:
            key, value = self._heads(bucket.rows(own), 2)
            key = torch.cat([_each(memory[0], bucket.count), key], dim=2)
            value = torch.cat([_each(memory[1], bucket.count), value], dim=2)
            if ends_only:
                query = self._heads(queries[done : done + bucket.sentences, None], 1)[0]
                done += bucket.sentences
            else:
                query = self._heads(bucket.rows(queries), 1)[0]
            joined = _joined(attend(query, key, value, _seen(bucket, key.shape[2] - bucket.length, ends_only)))
            attended.append(joined.flatten(0, 1))
        return self._rest(rows, torch.cat(attended))

    def _project(self, normed: Tensor, first: int = 0, last: int = 3) -> tuple[Tensor, ...]:
        """Queries (0), keys (1) and values (2), from `first` up to `last`, of [N, n, H]: [N, heads, n, H / heads]."""
        return self._heads(self._linear(normed, first, last), last - first)

    def _linear(self, normed: Tensor, first: int, last: int) -> Tensor:
        attention, width = self.module.attn, normed.shape[-1]
        part = slice(first * width, last * width)
        bias = attention.in_proj_bias
        return frozen_linear(normed, attention.in_proj_weight[part], None if bias is None else bias[part])

    def _heads(self, packed: Tensor, kinds: int) -> tuple[Tensor, ...]:
        attention = self.module.attn
        split = packed.view(*packed.shape[:2], kinds, attention.num_heads, attention.head_dim)
        return split.permute(2, 0, 3, 1, 4).unbind(0)

    def _causal(self, states: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self._rest(states, _joined(attend(query, key, value, causal=True)))

    def _rest(self, states: Tensor, joined: Tensor) -> Tensor:
        """What follows the attention: its projection, the MLP, and both residuals."""
        module = self.module
        states = states + module.ls_1(frozen_linear(joined, module.attn.out_proj.weight, module.attn.out_proj.bias))
        normed = module.ln_2(states)
        if self._plain_mlp:
            first, activation, second = module.mlp
            hidden = frozen_linear(normed, first.weight, first.bias)
            # QuickGELU is x * sigmoid(a x): in one kernel and with one tensor kept for the gradient.
            quick = type(activation) is QuickGELU
            hidden = F.silu(1.702 * hidden) / 1.702 if quick else activation(hidden)
            hidden = frozen_linear(hidden, second.weight, second.bias)
        else:
            hidden = module.mlp(normed)
        mixed: Tensor = states + module.ls_2(hidden)
        return mixed

    def _whole(self, states: Tensor, mask: Tensor | None) -> Tensor:
        result: Tensor = self.module(states) if mask is None else self.module(states, attn_mask=mask)
        return result

    def _whole_sentences(
        self, prefix: Tensor, rows: Tensor, buckets: Sequence[Bucket], mask: Tensor, ends_only: bool
    ) -> Tensor:
        shared, found = prefix.shape[1], []
        for bucket in buckets:
            states = torch.cat([_each(prefix, bucket.count), bucket.rows(rows)], dim=1)
            length = states.shape[1]
            states = self._whole(states, mask[:length, :length])[:, shared:]
            if ends_only:
                states = states[torch.arange(len(states), device=states.device), bucket.ends.repeat(bucket.groups)]
            found.append(states if ends_only else states.flatten(0, 1))
        return torch.cat(found)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *, causal: bool = False) -> Tensor:
    """Softmax attention of [N, heads, n, d] over [N, heads, m, d]; `mask` is true where a row may look.

    On a CPU in bfloat16 it is written out: PyTorch's fused kernel takes four times as long as two matrix products.
    """
    if query.device.type != "cpu" or query.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)
    scores = query * query.shape[-1] ** -0.5 @ key.transpose(-2, -1)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    attended: Tensor = scores.softmax(dim=-1) @ value
    return attended


def _seen(bucket: Bucket, shared: int, ends_only: bool) -> Tensor | None:
    """Which of the shared and own rows each query may look at; None where it may look at all."""
    device = bucket.ends.device
    if not ends_only:
        return torch.ones(bucket.length, shared + bucket.length, dtype=torch.bool, device=device).tril(shared)
    if bucket.even:
        return None
    seen = torch.arange(shared + bucket.length, device=device) <= (shared + bucket.ends)[:, None]
    return seen.repeat(bucket.groups, 1)[:, None, None]


def _each(shared: Tensor, count: int) -> Tensor:
    """What each of G groups has, [G, ...], for each of its `count` sentences: [G * count, ...]."""
    return shared[:, None].expand(-1, count, *shared.shape[1:]).flatten(0, 1)


def _joined(attended: Tensor) -> Tensor:
    """Heads side by side: [N, heads, n, d] -> [N, n, heads * d]."""
    return attended.transpose(1, 2).flatten(2)
