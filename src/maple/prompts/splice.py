"""Where prompt tokens sit: the only file that indexes token positions.

Text: [SOS] [P prompt tokens] [rest of the initial words] [class name] "." [EOT]; vision: [CLS] [patches] [P prompt
tokens]. Tokens of the first layer take these places before positions are added (text) or after (vision); tokens of
deeper layers replace whatever stands there at the entry of their block, and get no position.

Source: MaPLe section 3.2, equations 3-6; muzairkhattak/multimodal-prompt-learning@69bce21 clip/model.py:313-328,
452-463; class name in the middle or in front: KaiyangZhou/CoOp@ff61507 trainers/coop.py:119-185.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from maple.clip import Backbone
from maple.errors import ClassNamesError, ConfigError

Position = Literal["end", "middle", "front"]
PLACEHOLDER = "X"


@dataclass(frozen=True)
class Sentences:
    """One sentence per class, with places held open for prompt tokens.

    Attributes:
        ids: [C, T] int64, cut after the longest sentence: under a causal mask, what follows EOT is never read.
        slots: [C, P] int64, the positions of the prompt tokens.
        ends: [C] int64, the position of EOT.
        shared: with how many equal tokens, slots included, all sentences begin; 1 (SOS) to the earliest EOT.
    """

    ids: Tensor
    slots: Tensor
    ends: Tensor
    shared: int

    @cached_property
    def content(self) -> tuple[object, ...]:
        """All that these are, to compare by."""
        return (self.shared, *(str(part.tolist()) for part in (self.ids, self.slots, self.ends)))

    def parts(self, groups: int, shared: int) -> "Parts":
        """The sentences cut after `shared` tokens, for `groups` prompts each of which all of them are read with."""
        early = int((self.slots[0] < shared).sum())
        return Parts(
            prefix_ids=self.ids[:1, :shared].expand(groups, -1),
            suffix_ids=self.ids[:, shared:].repeat(groups, 1),
            prefix_slots=self.slots[:1, :early].expand(groups, -1),
            suffix_slots=(self.slots[:, early:] - shared).repeat(groups, 1),
            ends=self.ends - shared,
            shared=shared,
        )


@dataclass(frozen=True)
class Parts:
    """Sentences in two parts: what they share, once for each of G groups, and the rest of each of C sentences.

    Attributes:
        prefix_ids, prefix_slots: [G, S] and [G, p], for prompts that lie in the prefix.
        suffix_ids, suffix_slots: [G * C, T - S] and [G * C, P - p], group by group, counted from the cut.
        ends: [C], the row of the suffix at which each sentence ends.
        shared: S.
    """

    prefix_ids: Tensor
    suffix_ids: Tensor
    prefix_slots: Tensor
    suffix_slots: Tensor
    ends: Tensor
    shared: int

    def put(self, prefix: Tensor, suffix: Tensor, prompt: Tensor) -> tuple[Tensor, Tensor]:
        """Put `prompt` into both parts, [G, S, Ht] and [G * C, T - S, Ht].

        It is [P, Ht], [C, P, Ht], [G, 1, P, Ht], or, with nothing but SOS shared, [G, C, P, Ht].
        """
        early = self.prefix_slots.shape[1]
        if early:
            first = prompt.flatten(0, -3) if prompt.ndim > 2 else prompt
            prefix = put_text(prefix, first[..., :early, :], self.prefix_slots)
        if self.suffix_slots.shape[1]:
            rest = prompt[..., early:, :]
            if prompt.ndim == 4:
                rest = rest.expand(-1, len(suffix) // len(prompt), -1, -1).flatten(0, 1)
            suffix = put_text(suffix, rest, self.suffix_slots)
        return prefix, suffix


def clean_class_names(names: Sequence[str]) -> tuple[str, ...]:
    """Check a list of class names and write them as words: underscores become spaces.

    Raises:
        ClassNamesError: no list, an empty list, or a name that is not a string with something in it.
    """
    if isinstance(names, str):
        raise ClassNamesError(f"class names must be a list of strings, not the one string {names!r}; write [{names!r}]")
    if not len(names):
        raise ClassNamesError("the list of class names is empty; at least one is needed")
    for index, name in enumerate(names):
        if not isinstance(name, str) or not name.replace("_", " ").strip():
            raise ClassNamesError(f"class name {index} is {name!r}; every name must be a string with a word in it")
    return tuple(name.replace("_", " ") for name in names)


def write_sentences(
    backbone: Backbone, names: Sequence[str], *, prompt_length: int, init_text: str = "", position: Position = "end"
) -> Sentences:
    """Write "{prompt} {class name}." for every class.

    The prompt's words are `init_text`, of which the first P tokens become slots and the rest stays as fixed words, or
    "X X ... X" (P times) when it is empty. With `position` middle, half of the slots come after the class name; with
    front, all of them.

    Args:
        names: C class names; underscores are read as spaces.

    Raises:
        ClassNamesError: an empty list or name, or a sentence longer than the context.
        ConfigError: `init_text` has fewer tokens than P, or, in the middle or in front, more.
    """
    words = init_text.replace("_", " ").strip() or " ".join([PLACEHOLDER] * prompt_length)
    available = len(backbone.word_ids(words))
    if available < prompt_length:
        raise ConfigError(
            f"init_text {init_text!r} has {available} tokens, fewer than prompt_length={prompt_length}; "
            f"shorten the prompt to at most {available}, or leave init_text empty for random tokens"
        )
    if position != "end" and available != prompt_length:
        raise ConfigError(
            f"init_text {init_text!r} has {available} tokens; with the class name in the {position} every one must be "
            f"learned: set prompt_length={available}"
        )
    cleaned = clean_class_names(names)
    ids = backbone.tokenize([f"{words} {name}." for name in cleaned])
    slots = torch.arange(1, 1 + prompt_length).repeat(len(cleaned), 1)
    if position != "end":
        before = prompt_length // 2 if position == "middle" else 0
        for row, name in enumerate(cleaned):
            slots[row] = _move_class_name(ids[row], prompt_length, before, len(backbone.word_ids(name)))
    ends = backbone.text.end_positions(ids)
    alike = ((ids == ids[0]) & _same_slots(slots, ids.shape[1])).all(dim=0).int()
    return Sentences(
        ids[:, : int(ends.max()) + 1].contiguous().to(backbone.device),
        slots.to(backbone.device),
        ends.to(backbone.device),
        shared=max(1, min(int(alike.cumprod(0).sum()), int(ends.min()))),
    )


def _same_slots(slots: Tensor, length: int) -> Tensor:
    """Whether each position is a slot in a sentence exactly if it is in the first: [C, length], of slots [C, P]."""
    is_slot = torch.zeros(len(slots), length, dtype=torch.bool).scatter(1, slots, value=True)
    return is_slot == is_slot[0]


def _move_class_name(ids: Tensor, length: int, before: int, name_length: int) -> Tensor:
    """Reorder one row [T] in place so that only `before` prompt tokens precede the class name; return its slots [P]."""
    prompt, name = ids[1 : 1 + length].clone(), ids[1 + length : 1 + length + name_length].clone()
    ids[1 : 1 + length + name_length] = torch.cat([prompt[:before], name, prompt[before:]])
    return torch.cat([torch.arange(1, 1 + before), torch.arange(1 + before + name_length, 1 + length + name_length)])


def put_text(states: Tensor, prompt: Tensor, slots: Tensor) -> Tensor:
    """Put `prompt` [P, Ht], or one per sentence [C, P, Ht], into the slots [C, P] of states [C, T, Ht]."""
    tokens = prompt.to(states.dtype).expand(len(states), -1, -1)
    return states.scatter(1, slots[:, :, None].expand(-1, -1, states.shape[-1]), tokens)


def append_vision(states: Tensor, prompt: Tensor) -> Tensor:
    """Append `prompt` [P, Hv] after the patches of states [B, n, Hv]: [B, n + P, Hv]."""
    return torch.cat([states, prompt.to(states.dtype).expand(len(states), -1, -1)], dim=1)


def replace_vision(states: Tensor, prompt: Tensor) -> Tensor:
    """Replace the last P tokens of states [B, n, Hv] by `prompt` [P, Hv]."""
    return append_vision(states[:, : states.shape[1] - prompt.shape[-2]], prompt)
