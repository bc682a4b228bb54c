"""What a method changes in the blocks of a tower: a sequence of layer edits, one per block.

A tower's blocks are frozen. An edit writes tokens at a block's entry, adds a residual branch around the block, adds
low-rank updates to the linear layers of its attention, or replaces the affine parameters of its norms.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

Projection = Literal["q", "k", "v", "o"]
"""The linear layers of an attention: queries, keys, values, and its output."""

Affine = tuple[Tensor, Tensor]
"""Weight and bias [H] of a layer norm."""


@dataclass(frozen=True, eq=False)
class LowRank:
    """An update of a linear layer: `scale * drop(x) @ down.T @ up.T` is added to its output for x.

    Attributes:
        down, up: [r, H] and [H, r].
        drop: dropout of the input; None for none.

    Source: Hu et al., "LoRA", ICLR 2022, section 4.1.
    """

    down: Tensor
    up: Tensor
    scale: float = 1.0
    drop: Callable[[Tensor], Tensor] | None = None

    def __call__(self, inputs: Tensor) -> Tensor:
        """The update of the output for inputs [..., H]: [..., H]."""
        kept = inputs if self.drop is None else self.drop(inputs)
        return self.scale * F.linear(F.linear(kept, self.down.to(kept.dtype)), self.up.to(kept.dtype))

    def weight(self) -> Tensor:
        """The update as a matrix that can be added to the layer's weight: [H, H]."""
        return self.scale * self.up @ self.down


@dataclass(frozen=True, eq=False)
class LayerEdit:
    """What a method changes in one block of width H; without arguments, nothing.

    Functions are applied to rows, each on its own: what they compute for a row must not depend on other rows.

    Attributes:
        prompt: tokens that replace the states in the slots of the prompts. Text: [P, Ht], [C, P, Ht] for each sentence,
            or [G, 1, P, Ht] or [G, C, P, Ht] for all sentences with each of G prompts. Images: [P, Hv], or [B, P, Hv]
            for each image; the first ones are appended to the patches. In the first block they enter before positions
            are added (text) or before the pre-norm (images).
        after_positions: whether they enter the first block after positions and pre-norm instead.
        tokens: [K, H], rows of their own, which no sentence has slots for: the first ones are inserted after the first
            token (text) or appended (images), those of later blocks replace them. They enter after positions and
            pre-norm, and get none. Text features are still read at EOT.
        keep: the share that the rows of `tokens` keep of what the block before left there.
        input_residual: in the first block only, added to what enters the tower: token embeddings before positions
            (text), or states after the pre-norm (images).
        residual: added to the block's output; a function of the first norm of the block's input.
        low_rank: updates of the linear layers of the attention.
        norms: affine parameters in place of those of the norms before the attention and before the MLP.
        is_random: whether a function draws random numbers. Rows that are otherwise computed once for all sentences are
            then computed for each, with random numbers of their own.

    Example:
        >>> edits = [LayerEdit(prompt=torch.zeros(2, 512)), LayerEdit(), LayerEdit(residual=nn.Linear(512, 512))]
    """

    prompt: Tensor | None = None
    after_positions: bool = False
    tokens: Tensor | None = None
    keep: float = 0.0
    input_residual: Callable[[Tensor], Tensor] | None = None
    residual: Callable[[Tensor], Tensor] | None = None
    low_rank: Mapping[Projection, LowRank] = field(default_factory=dict)
    norms: tuple[Affine | None, Affine | None] = (None, None)
    is_random: bool = False

    @property
    def only_prompts(self) -> bool:
        """Whether nothing but prompts enters, and the block itself is unchanged."""
        others = (self.tokens, self.input_residual, self.residual)
        return not self.is_inside and not self.after_positions and all(each is None for each in others)

    def enter(
        self,
        states: Tensor,
        insert_prompt: Callable[[Tensor, Tensor], Tensor],
        add_positions: Callable[[Tensor], Tensor] | None,
        *,
        residual_first: bool,
    ) -> Tensor:
        """States at the entry of the block, with prompts in their slots.

        Args:
            insert_prompt: returns the states with a prompt in its slots.
            add_positions: what happens before the first block alone: positions are added, or the pre-norm is applied;
                None for a later block.
            residual_first: whether `input_residual` comes before it.
        """
        late = self.after_positions and add_positions is not None
        if self.prompt is not None and not late:
            states = insert_prompt(states, self.prompt)
        if add_positions is not None:
            residual = self.input_residual
            states = states + residual(states) if residual is not None and residual_first else states
            states = add_positions(states)
            states = states + residual(states) if residual is not None and not residual_first else states
        return insert_prompt(states, self.prompt) if self.prompt is not None and late else states

    @property
    def is_inside(self) -> bool:
        """Whether it changes layers inside the block, which only a standard block permits."""
        return bool(self.low_rank) or self.norms != (None, None)


NO_EDIT = LayerEdit()


def prompt_edits(prompts: Sequence[Tensor]) -> list[LayerEdit]:
    """The edits of prompts for the first J blocks.

    Example:
        >>> len(prompt_edits([torch.zeros(2, 512)] * 9))
        9
    """
    return [LayerEdit(prompt=prompt) for prompt in prompts]


def edits_of_all_blocks(edits: Sequence[LayerEdit], depth: int) -> list[LayerEdit]:
    """The edits of a tower's `depth` blocks: those after the last edit are unchanged."""
    return [*edits, *[NO_EDIT] * (depth - len(edits))]
