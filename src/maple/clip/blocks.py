"""One residual attention block, open inside: queries of some rows only, keys and values of states seen elsewhere.

The arithmetic is that of the block it is made of: the same weights, norms and order, so results agree up to rounding.
Blocks that are built otherwise run whole, through the same two calls, without the savings.

Source: open_clip `ResidualAttentionBlock` (transformer.py); CLIP (Radford et al., 2021), section 2.4.
"""

from typing import Any

import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor, nn


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

    def causal(self, states: Tensor, mask: Tensor) -> Tensor:
        """Rows attend to themselves and to what comes before; `mask` [n, n] says so additively: [N, n, H]."""
        if not self.is_open:
            return self._whole(states, mask)
        query, key, value = self._project(states)
        return self._rest(states, F.scaled_dot_product_attention(query, key, value, is_causal=True))

    def full(self, states: Tensor, first_row_only: bool = False) -> Tensor:
        """All rows attend to all: [N, n, H], or only the first of them, [N, 1, H]."""
        if not self.is_open:
            states = self._whole(states, None)
            return states[:, :1] if first_row_only else states
        query, key, value = self._project(states)
        if first_row_only:
            states, query = states[:, :1], query[:, :, :1]
        return self._rest(states, F.scaled_dot_product_attention(query, key, value))

    def full_with_attention(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """As `full`, and what each row attended to: [N, n, H] and [N, heads, n, n], whose rows sum to 1.

        Slower than `full`, which never holds these weights. Only of an open block.
        """
        query, key, value = self._project(states)
        weights = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(dim=-1)
        return self._rest(states, weights @ value), weights

    def after_prefix(
        self, prefix: Tensor, suffix: Tensor, mask: Tensor, ends: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Sentences in two parts: S rows that groups of sentences share, and the T - S rows of each.

        Args:
            prefix: [G, S, H], one per group.
            suffix: [G * C, T - S, H], group by group.
            mask: [T, T], additive and causal.
            ends: [C], with it only the suffix row at which each sentence ends is computed, and the prefix is not.

        Returns:
            The new prefix and the new suffix; with `ends` the prefix as it was, and [G * C, 1, H].
        """
        if not self.is_open:
            return self._whole_sentences(prefix, suffix, mask, ends)
        groups, shared = prefix.shape[:2]
        each = len(suffix) // groups
        query, key, value = self._project(suffix)
        query_before, key_before, value_before = self._project(prefix)
        key = torch.cat([key_before.repeat_interleave(each, dim=0), key], dim=2)
        value = torch.cat([value_before.repeat_interleave(each, dim=0), value], dim=2)
        if ends is not None:
            seen = torch.arange(key.shape[2], device=ends.device) <= (shared + ends)[:, None]
            seen = seen.repeat(groups, 1)[:, None, None]
            ends = ends.repeat(groups)
            query = _row(query.transpose(1, 2), ends).transpose(1, 2)
            attended = F.scaled_dot_product_attention(query, key, value, attn_mask=seen)
            return prefix, self._rest(_row(suffix, ends), attended)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask[shared:].to(query.dtype))
        before = F.scaled_dot_product_attention(query_before, key_before, value_before, is_causal=True)
        return self._rest(prefix, before), self._rest(suffix, attended)

    def _project(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of states [N, n, H], each [N, heads, n, H / heads]."""
        attention = self.module.attn
        packed = F.linear(self.module.ln_1(states), attention.in_proj_weight, attention.in_proj_bias)
        count, rows, _ = states.shape
        query, key, value = packed.view(count, rows, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
        return query, key, value

    def _rest(self, states: Tensor, attended: Tensor) -> Tensor:
        """What follows the attention: its projection, the MLP, and both residuals."""
        module = self.module
        joined = attended.transpose(1, 2).reshape(states.shape)
        states = states + module.ls_1(F.linear(joined, module.attn.out_proj.weight, module.attn.out_proj.bias))
        mixed: Tensor = states + module.ls_2(module.mlp(module.ln_2(states)))
        return mixed

    def _whole(self, states: Tensor, mask: Tensor | None) -> Tensor:
        result: Tensor = self.module(states) if mask is None else self.module(states, attn_mask=mask)
        return result

    def _whole_sentences(
        self, prefix: Tensor, suffix: Tensor, mask: Tensor, ends: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        groups, shared = prefix.shape[:2]
        each = len(suffix) // groups
        states = self._whole(torch.cat([prefix.repeat_interleave(each, dim=0), suffix], dim=1), mask)
        if ends is not None:
            return prefix, _row(states[:, shared:], ends.repeat(groups))
        return states[::each, :shared], states[:, shared:]


def _row(states: Tensor, rows: Tensor) -> Tensor:
    """One row of each: [N, n, ...] and [N] -> [N, 1, ...]."""
    return states[torch.arange(len(states), device=states.device), rows][:, None]
