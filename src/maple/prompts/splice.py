"""Where prompt tokens sit: the only file that indexes token positions.

Text: [SOS] [P prompt tokens] [rest of the initial words] [class name] "." [EOT]; vision: [CLS] [patches] [P prompt
tokens]. Tokens of the first layer take these places before positions are added (text) or after (vision); tokens of
deeper layers replace whatever stands there at the entry of their block, and get no position.

Source: MaPLe section 3.2, equations 3-6; muzairkhattak/multimodal-prompt-learning@69bce21 clip/model.py:313-328,
452-463; class name in the middle or in front: KaiyangZhou/CoOp@ff61507 trainers/coop.py:119-185.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from maple.clip import Backbone
from maple.clip.blocks import Bucket
from maple.errors import ConfigError
from maple.names import clean_class_names

Position = Literal["end", "middle", "front"]
PLACEHOLDER = "X"
_BUCKETS = 6
_CUTS_KEPT = 8


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
    _cuts: dict[tuple[int, int, int], "Parts"] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def content(self) -> tuple[object, ...]:
        """All that these are, to compare by."""
        return (self.shared, *(str(part.tolist()) for part in (self.ids, self.slots, self.ends)))

    def cut(self, groups: int, shared: int, most_rows: int = 2**62) -> "Parts":
        """The sentences cut after `shared` tokens, for `groups` prompts each of which all of them are read with.

        Args:
            most_rows: how many rows a suffix may have; more sentences go into another one.
        """
        key = (groups, shared, most_rows)
        if key not in self._cuts:
            if len(self._cuts) >= _CUTS_KEPT:
                self._cuts.clear()
            with torch.inference_mode(False):  # what an evaluation cuts must serve training later
                self._cuts[key] = self._cut(*key)
        return self._cuts[key]

    def _cut(self, groups: int, shared: int, most_rows: int) -> "Parts":
        early = int((self.slots[0] < shared).sum())
        lengths, order = torch.sort(self.ends.cpu() + 1 - shared, stable=True)
        suffixes, start = [], 0
        for stop in _stops(lengths.tolist(), groups, most_rows):
            suffixes.append(self._suffix(order[start:stop], lengths[start:stop].tolist(), groups, shared, early))
            start = stop
        return Parts(
            prefix_ids=self.ids[:1, :shared].expand(groups, -1),
            prefix_slots=self.slots[:1, :early].expand(groups, -1),
            suffixes=tuple(suffixes),
            order=order.argsort().to(self.ids.device),
        )

    def _suffix(self, order: Tensor, lengths: list[int], groups: int, shared: int, early: int) -> "Suffix":
        device = self.ids.device
        buckets, ids, positions, slots = [], [], [], []
        start = first = 0
        for stop in best_cuts(lengths, _BUCKETS):
            chosen, length = order[first:stop].to(device), lengths[stop - 1]
            own = torch.arange(length, device=device)
            bucket = Bucket(start, groups, stop - first, length, self.ends[chosen] - shared, lengths[first] == length)
            begins = start + length * torch.arange(bucket.sentences, device=device).view(groups, -1, 1)
            buckets.append(bucket)
            ids.append(self.ids[chosen, shared : shared + length].repeat(groups, 1).flatten())
            positions.append((own + shared).repeat(bucket.sentences))
            slots.append(begins + self.slots[chosen, early:] - shared)
            start, first = start + bucket.sentences * length, stop
        joined = torch.cat(slots, dim=1)
        return Suffix(torch.cat(ids), torch.cat(positions), joined, order.to(device), tuple(buckets), early)


@dataclass(frozen=True)
class Suffix:
    """The ends of some sentences as packed rows, bucket by bucket, with next to no padding.

    Attributes:
        ids, positions: [R] int64, tokens and where in their sentences they stand.
        slots: [G, c, P - p] int64, the rows of the prompt tokens that lie here, the first p being in the prefix.
        order: [c] int64, which sentences these are.
        buckets: where they lie.
        early: p.
    """

    ids: Tensor
    positions: Tensor
    slots: Tensor
    order: Tensor
    buckets: tuple[Bucket, ...]
    early: int

    def put(self, rows: Tensor, prompt: Tensor) -> Tensor:
        """Put `prompt` ([P, Ht], [C, P, Ht], [G, 1, P, Ht] or [G, C, P, Ht]) into the packed rows [R, Ht]."""
        if not self.slots.shape[2]:
            return rows
        per_sentence = prompt.ndim > 2 and prompt.shape[-3] > 1
        chosen = prompt.index_select(-3, self.order) if per_sentence else prompt
        tokens = chosen[..., self.early :, :].to(rows.dtype).expand(*self.slots.shape, -1)
        return rows.index_copy(0, self.slots.flatten(), tokens.flatten(0, 2))

    def by_sentence(self, features: Tensor) -> Tensor:
        """Rows [G * c, D], bucket by bucket, as [G, c, D]."""
        parts = features.split([bucket.sentences for bucket in self.buckets])
        return torch.cat(
            [one.unflatten(0, (bucket.groups, -1)) for one, bucket in zip(parts, self.buckets, strict=True)], 1
        )


@dataclass(frozen=True)
class Parts:
    """Sentences in two parts: what they share, once for each of G groups, and the rest of each, in some suffixes.

    Attributes:
        prefix_ids, prefix_slots: [G, S] and [G, p], for prompts that lie in the prefix.
        suffixes: of all C sentences, the shorter ones first.
        order: [C] int64, where in them each sentence is.
    """

    prefix_ids: Tensor
    prefix_slots: Tensor
    suffixes: tuple[Suffix, ...]
    order: Tensor

    def put(self, prefix: Tensor, prompt: Tensor) -> Tensor:
        """Put `prompt` into the prefix [G, S, Ht]: [P, Ht], [G, 1, P, Ht], or, where it has no slots, any other."""
        early = self.prefix_slots.shape[1]
        if not early:
            return prefix
        first = prompt.flatten(0, -3) if prompt.ndim > 2 else prompt
        return put_text(prefix, first[..., :early, :], self.prefix_slots)


def _stops(lengths: list[int], groups: int, most_rows: int) -> list[int]:
    """Where to cut a list of ascending lengths so that no part is padded to more than `most_rows` rows."""
    stops, start = [], 0
    for index, length in enumerate(lengths):
        if index > start and (index + 1 - start) * length * groups > most_rows:
            stops.append(index)
            start = index
    return [*stops, len(lengths)]


def best_cuts(lengths: Sequence[int], most: int) -> list[int]:
    """Where to cut ascending lengths into at most `most` runs with the least padding to the longest of each: the stops.

    Of equal ways the one with the fewest runs.
    """
    ends = [index for index in range(1, len(lengths)) if lengths[index] != lengths[index - 1]] + [len(lengths)]
    # best[stop]: the cheapest way to cut what lies before `stop`, as (rows, runs, stops).
    best: dict[int, tuple[int, int, list[int]]] = {0: (0, 0, [])}
    for _ in range(most):
        reached = dict(best)
        for stop in ends:
            for start, (rows, runs, stops) in best.items():
                if start < stop:
                    way = (rows + (stop - start) * lengths[stop - 1], runs + 1, [*stops, stop])
                    reached[stop] = min(reached.get(stop, way), way)
        best = reached
    return best[len(lengths)][2]


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
    return _sentences(backbone, ids, slots)


def read_sentences(backbone: Backbone, texts: Sequence[str]) -> Sentences:
    """Sentences as they are, without a place for prompt tokens.

    Raises:
        ClassNamesError: one is longer than the context.
    """
    ids = backbone.tokenize(texts)
    return _sentences(backbone, ids, ids.new_zeros(len(texts), 0))


def _sentences(backbone: Backbone, ids: Tensor, slots: Tensor) -> Sentences:
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
    tokens = prompt.to(states.dtype).expand(states.shape[0], -1, -1)
    return states.scatter(1, slots[:, :, None].expand(-1, -1, states.shape[-1]), tokens)


def append_vision(states: Tensor, prompt: Tensor) -> Tensor:
    """Append `prompt` [P, Hv] after the patches of states [B, n, Hv]: [B, n + P, Hv]."""
    return torch.cat([states, prompt.to(states.dtype).expand(states.shape[0], -1, -1)], dim=1)


def replace_vision(states: Tensor, prompt: Tensor) -> Tensor:
    """Replace the last P tokens of states [B, n, Hv] by `prompt` [P, Hv]."""
    return append_vision(states[:, : states.shape[1] - prompt.shape[-2]], prompt)
