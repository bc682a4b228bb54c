"""Passes through a frozen tower that several computations ask for, made as one.

A computation runs until it asks for a pass that has not been made. When all of them have come so far, passes that are
alike are made in one batch, and each computation begins again with the answers at hand: what it repeats is small beside
a pass. So any code that calls `encode_text` and `encode_image` can share its passes, and need not know of it.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextvars import ContextVar
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor

_Result = TypeVar("_Result")


class Pass(Protocol):
    """A pass through a tower that is asked for."""

    @property
    def likeness(self) -> Hashable:
        """Passes of equal likeness can be made as one."""
        ...

    def alone(self) -> Tensor:
        """Make it."""
        ...

    def jointly(self, others: Sequence[Self]) -> list[Tensor]:
        """Make it and `others`, all alike, as one: the result of each, this one's first."""
        ...


class _Unanswered(BaseException):
    def __init__(self, wanted: Pass) -> None:
        super().__init__()
        self.wanted = wanted
        self.with_gradient = torch.is_grad_enabled()


_answers: ContextVar[Iterator[Tensor] | None] = ContextVar("answers", default=None)


def answer(wanted: Pass) -> Tensor:
    """The result of a pass: made at once, or, within `together`, with those of the other computations."""
    answers = _answers.get()
    if answers is None:
        return wanted.alone()
    for known in answers:
        return known
    raise _Unanswered(wanted)


def together(computations: Sequence[Callable[[], _Result]]) -> list[_Result]:
    """The results of `computations`, their passes through a tower made as one where they are alike.

    The n-th pass that one asks for is made with the n-th of the others. A computation must come to the same when it is
    begun again: it may neither draw random numbers nor count its calls. A single one is just called.
    """
    if len(computations) == 1:
        return [computations[0]()]
    answers: list[list[Tensor]] = [[] for _ in computations]
    results: dict[int, _Result] = {}
    while len(results) < len(computations):
        asked: dict[int, tuple[Pass, bool]] = {}
        for number, computation in enumerate(computations):
            if number in results:
                continue
            before = _answers.set(iter(answers[number]))
            try:
                results[number] = computation()
            except _Unanswered as unanswered:
                asked[number] = unanswered.wanted, unanswered.with_gradient
            finally:
                _answers.reset(before)
        for alike in _alike(asked):
            first, *others = (asked[number][0] for number in alike)
            with torch.set_grad_enabled(asked[alike[0]][1]):
                found = first.jointly(others) if others else [first.alone()]
            for number, result in zip(alike, found, strict=True):
                answers[number].append(result)
    return [results[number] for number in range(len(computations))]


def _alike(asked: dict[int, tuple[Pass, bool]]) -> list[list[int]]:
    """The numbers of passes that can be made as one, in their order; each comes with whether gradients are wanted."""
    groups: dict[Hashable, list[int]] = {}
    for number, (wanted, with_gradient) in asked.items():
        groups.setdefault((with_gradient, wanted.likeness), []).append(number)
    return list(groups.values())
