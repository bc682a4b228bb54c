"""Where prompt tokens are inserted: the only file that indexes token positions.

Text: [SOS] [P prompt tokens] [rest of the initial words] [class name] "." [EOT]; vision: [CLS] [patches] [P prompt
tokens]. Tokens of the first layer are inserted before positions are added (text) or after (vision); tokens of deeper
layers replace the states at these positions at the entry of their block, and get no position.

Source: MaPLe section 3.2, equations 3-6; muzairkhattak/multimodal-prompt-learning@69bce21 clip/model.py:313-328,
452-463; class name in the middle or in front: KaiyangZhou/CoOp@ff61507 trainers/coop.py:119-185.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from maple.clip import Backbone
from maple.clip.towers.blocks import Bucket
from maple.errors import ConfigError
from maple.names import clean_class_names

Position = Literal["end", "middle", "front"]
_BUCKETS = 6  # of sentences of similar length: more of them save little padding, and each costs an attention call
_SPLITS_KEPT = 8


@dataclass(frozen=True)
class Sentences:
    """One sentence per class, with slots for prompt tokens.

    Attributes:
        ids: [C, T] int64, truncated after the longest sentence unless the text tower reads what follows it.
        slots: [C, P] int64, the positions of the prompt tokens.
        ends: [C] int64, the position of EOT, or of the last token that the text tower reads.
        shared: the length of the prefix, slots included, that all sentences have in common; at least 1 (SOS).

    Example:
        >>> sentences = write_sentences(load_clip("ViT-B-16"), ["cat", "dog"], prompt_length=2)  # "X X cat."
        >>> sentences.slots.tolist(), sentences.ends.tolist(), sentences.shared
        ([[1, 2], [1, 2]], [5, 5], 3)
    """

    ids: Tensor
    slots: Tensor
    ends: Tensor
    shared: int
    _splits: dict[tuple[int, int, int], "SplitSentences"] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def content(self) -> tuple[object, ...]:
        """A hashable key: equal for sentences with equal tokens and slots."""
        return (self.shared, *(str(part.tolist()) for part in (self.ids, self.slots, self.ends)))

    def select(self, rows: Tensor) -> "Sentences":
        """Some of the sentences, by their rows [n] int64."""
        ends = self.ends[rows]
        return Sentences(self.ids[rows, : int(ends.max()) + 1], self.slots[rows], ends, self.shared)

    def split(self, groups: int, shared: int, most_rows: int = 2**62) -> "SplitSentences":
        """Split the sentences after `shared` tokens into one prefix for all and a packed suffix for each; cached.

        Under a causal mask the prefix's states do not depend on the suffix, so each block computes them once and not
        once per class. Suffixes are packed by length, so that hardly any padding is computed.

        Args:
            groups: G prompts, with each of which all sentences are encoded.
            most_rows: rows that one `PackedSuffix` may have; the other sentences go into further ones.
        """
        key = (groups, shared, most_rows)
        if key not in self._splits:
            if len(self._splits) >= _SPLITS_KEPT:
                self._splits.clear()
            with torch.inference_mode(False):  # what an evaluation splits may be used by a later training step
                self._splits[key] = self._split(*key)
        return self._splits[key]

    def _split(self, groups: int, shared: int, most_rows: int) -> "SplitSentences":
        early = int((self.slots[0] < shared).sum())
        lengths, order = torch.sort(self.ends.cpu() + 1 - shared, stable=True)
        stops, start = [], 0
        for index, length in enumerate(lengths.tolist()):
            # Ascending lengths: one more sentence pads all before it to its own length.
            if index > start and (index + 1 - start) * length * groups > most_rows:
                stops.append(index)
                start = index
        suffixes = (
            self._suffix(order[start:stop], lengths[start:stop].tolist(), groups, shared, early)
            for start, stop in pairwise([0, *stops, len(lengths)])
        )
        return SplitSentences(
            prefix_ids=self.ids[:1, :shared].expand(groups, -1),
            prefix_slots=self.slots[:1, :early].expand(groups, -1),
            suffixes=tuple(suffixes),
            order=order.argsort().to(self.ids.device),
        )

    def _suffix(self, order: Tensor, lengths: list[int], groups: int, shared: int, early: int) -> "PackedSuffix":
        """Pack sentences of ascending `lengths`: bucket by bucket, and in each bucket group by group."""
        device = self.ids.device
        buckets, ids, positions, slots = [], [], [], []
        start = first = 0
        for stop in bucket_stops(lengths, _BUCKETS):
            chosen, length = order[first:stop].to(device), lengths[stop - 1]
            offsets = torch.arange(length, device=device)
            bucket = Bucket(start, groups, stop - first, length, self.ends[chosen] - shared, lengths[first] == length)
            begins = start + length * torch.arange(bucket.sentences, device=device).view(groups, -1, 1)
            buckets.append(bucket)
            ids.append(self.ids[chosen, shared : shared + length].repeat(groups, 1).flatten())
            positions.append((offsets + shared).repeat(bucket.sentences))
            slots.append(begins + self.slots[chosen, early:] - shared)
            start, first = start + bucket.sentences * length, stop
        return PackedSuffix(
            torch.cat(ids), torch.cat(positions), torch.cat(slots, dim=1), order.to(device), tuple(buckets), early
        )


@dataclass(frozen=True)
class PackedSuffix:
    """The suffixes of c sentences, for each of G groups, as R packed rows.

    Attributes:
        ids, positions: [R] int64, tokens and their positions in the sentences.
        slots: [G, c, P - p] int64, the rows of the prompt tokens after the first p, which are in the prefix.
        order: [c] int64, the indices of these sentences.
        buckets: the consecutive rows of sentences of similar length.
        early: p.
    """

    ids: Tensor
    positions: Tensor
    slots: Tensor
    order: Tensor
    buckets: tuple[Bucket, ...]
    early: int

    def insert_prompts(self, rows: Tensor, prompt: Tensor) -> Tensor:
        """Insert `prompt` ([P, Ht], [C, P, Ht], [G, 1, P, Ht] or [G, C, P, Ht]) into the packed rows [R, Ht]."""
        if not self.slots.shape[2]:
            return rows
        per_sentence = prompt.ndim > 2 and prompt.shape[-3] > 1
        chosen = prompt.index_select(-3, self.order) if per_sentence else prompt
        tokens = chosen[..., self.early :, :].to(rows.dtype).expand(*self.slots.shape, -1)
        return rows.index_copy(0, self.slots.flatten(), tokens.flatten(0, 2))

    def unpack(self, features: Tensor) -> Tensor:
        """Features [G * c, D], bucket by bucket, as [G, c, D]."""
        parts = features.split([bucket.sentences for bucket in self.buckets])
        return torch.cat(
            [part.unflatten(0, (bucket.groups, -1)) for part, bucket in zip(parts, self.buckets, strict=True)], 1
        )


@dataclass(frozen=True)
class SplitSentences:
    """Sentences split into their common prefix, once for each of G groups, and their suffixes.

    Attributes:
        prefix_ids, prefix_slots: [G, S] and [G, p] int64, of the p prompt tokens that are in the prefix.
        suffixes: of all C sentences, the shorter ones first.
        order: [C] int64, the place of each sentence among them.
    """

    prefix_ids: Tensor
    prefix_slots: Tensor
    suffixes: tuple[PackedSuffix, ...]
    order: Tensor

    def insert_prompts(self, prefix: Tensor, prompt: Tensor, inserted: int = 0) -> Tensor:
        """Insert `prompt` into the prefix [G, S, Ht]: [P, Ht] or [G, 1, P, Ht]; of any shape if it has no slots.

        The slots come after rows that were `inserted` behind the first token.
        """
        early = self.prefix_slots.shape[1]
        if not early:
            return prefix
        first = prompt.flatten(0, -3) if prompt.ndim > 2 else prompt
        return insert_text(prefix, first[..., :early, :], self.prefix_slots + inserted)


def bucket_stops(lengths: Sequence[int], most: int) -> list[int]:
    """Divide ascending lengths into at most `most` buckets with the least padding: the stop index of each bucket.

    Of equally good divisions, the one with the fewest buckets.
    """
    ends = [index for index in range(1, len(lengths)) if lengths[index] != lengths[index - 1]] + [len(lengths)]
    # Dynamic programming. best[stop]: the cheapest division of the lengths before `stop`, as (rows, buckets, stops).
    best: dict[int, tuple[int, int, list[int]]] = {0: (0, 0, [])}
    for _ in range(most):
        reached = dict(best)
        for stop in ends:
            for start, (rows, buckets, stops) in best.items():
                if start < stop:
                    division = (rows + (stop - start) * lengths[stop - 1], buckets + 1, [*stops, stop])
                    reached[stop] = min(reached.get(stop, division), division)
        best = reached
    return best[len(lengths)][2]


def write_sentences(
    backbone: Backbone,
    names: Sequence[str],
    *,
    prompt_length: int,
    init_text: str = "",
    position: Position = "end",
    template: str = "",
) -> Sentences:
    """Write "{prompt} {class name}." for every class.

    The prompt is `init_text`, whose first P tokens become slots while the rest stays as fixed words, or "X X ... X" (P
    times, or another word of one token) if it is empty. With `position` middle, half of the slots come after the class
    name; with front, all of them.

    Args:
        names: C class names; underscores are read as spaces.
        template: a whole sentence with {} for the class name, in place of `init_text` and the full stop; its first P
            tokens become slots.

    Raises:
        ClassNamesError: the list or a name is empty, or a sentence is longer than the context.
        ConfigError: `init_text`, or the words before {}, have fewer tokens than P; or, if the class name is in the
            middle or in front, more.

    Example:
        >>> write_sentences(load_clip("ViT-B-16"), ["cat", "dog"], prompt_length=2, init_text="a photo of a").ids.shape
        torch.Size([2, 8])
    """
    words = init_text.replace("_", " ").strip() or " ".join([backbone.placeholder] * prompt_length)
    words = template.split("{}")[0] if template else words
    available = len(backbone.word_ids(words))
    if available < prompt_length:
        instead = "begin the template with more words" if template else "leave init_text empty for random tokens"
        raise ConfigError(
            f"{'template' if template else 'init_text'} {template or init_text!r} has {available} tokens"
            f"{' before the class name' if template else ''}, fewer than prompt_length={prompt_length}; shorten the "
            f"prompt to at most {available}, or {instead}"
        )
    if position != "end" and available != prompt_length:
        raise ConfigError(
            f"init_text {init_text!r} has {available} tokens; with the class name in the {position} all of them must "
            f"be learned: set prompt_length={available}"
        )
    cleaned = clean_class_names(names)
    sentence = template or f"{words} {{}}."
    ids = backbone.tokenize([sentence.replace("{}", name) for name in cleaned])
    first = backbone.first_word
    slots = torch.arange(first, first + prompt_length).repeat(len(cleaned), 1)
    if position != "end":
        before = prompt_length // 2 if position == "middle" else 0
        for row, name in enumerate(cleaned):
            length = len(backbone.word_ids(f"{words} {name}")) - prompt_length  # as the name is tokenized there
            slots[row] = _move_class_name(ids[row], first, prompt_length, before, length)
    return _sentences(backbone, ids, slots)


def read_sentences(backbone: Backbone, texts: Sequence[str], *, truncate: bool = False) -> Sentences:
    """Sentences without slots for prompt tokens; ClassNamesError if a longer one than the context is not truncated."""
    ids = backbone.tokenize(texts, truncate=truncate)
    return _sentences(backbone, ids, ids.new_zeros(len(texts), 0))


def _sentences(backbone: Backbone, ids: Tensor, slots: Tensor) -> Sentences:
    text = backbone.text
    ends = torch.full_like(ids[:, 0], ids.shape[1] - 1) if text.reads_padding else text.end_positions(ids)
    is_slot = torch.zeros(ids.shape, dtype=torch.bool).scatter(1, slots, value=True)
    equal = ((ids == ids[0]) & (is_slot == is_slot[0])).all(dim=0).int()
    return Sentences(
        ids[:, : int(ends.max()) + 1].contiguous().to(backbone.device),
        slots.to(backbone.device),
        ends.to(backbone.device),
        shared=max(1, min(int(equal.cumprod(0).sum()), int(ends.min()))),
    )


def _move_class_name(ids: Tensor, first: int, length: int, before: int, name_length: int) -> Tensor:
    """Reorder one row [T] in place so that only `before` prompt tokens precede the class name; return its slots [P].

    The prompt begins at `first`.
    """
    last = first + length + name_length
    prompt, name = ids[first : first + length].clone(), ids[first + length : last].clone()
    ids[first:last] = torch.cat([prompt[:before], name, prompt[before:]])
    return torch.cat([torch.arange(first, first + before), torch.arange(first + before + name_length, last)])


def insert_text(states: Tensor, prompt: Tensor, slots: Tensor) -> Tensor:
    """Insert `prompt` [P, Ht], or one per sentence [C, P, Ht], at the slots [C, P] of states [C, T, Ht]."""
    tokens = prompt.to(states.dtype).expand(states.shape[0], -1, -1)
    return states.scatter(1, slots[:, :, None].expand(-1, -1, states.shape[-1]), tokens)


def write_rows(states: Tensor, tokens: Tensor, start: int, replaced: int, keep: float = 0.0) -> Tensor:
    """Write `tokens` [K, H], or [N, K, H], into states [N, n, H] at row `start`, in place of the `replaced` rows there.

    The tokens keep a share of the states that they replace, as many as there are tokens: `keep * states + (1 - keep) *
    tokens`.
    """
    rows = tokens.to(states.dtype).expand(states.shape[0], -1, -1)
    if keep and replaced:
        rows = keep * states[:, start : start + replaced] + (1 - keep) * rows
    return torch.cat([states[:, :start], rows, states[:, start + replaced :]], dim=1)
