"""The only training loop: the next epoch of a trainer, or of several side by side."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from maple.data import Batch
from maple.errors import MapleError, TrainingDivergedError
from maple.methods import Method
from maple.prompts import together

if TYPE_CHECKING:
    from maple.train.trainer import Trainer

Batches = Iterable[tuple[Batch, int]]


@dataclass(frozen=True)
class StepReport:
    """One step, over the whole global batch."""

    epoch: int
    step: int
    images: int
    lr: float
    loss: float
    logs: dict[str, float]


@dataclass(frozen=True)
class EpochReport:
    """One epoch: means over its images; `losses` of each step, in order."""

    epoch: int
    lr: float
    loss: float
    logs: dict[str, float]
    losses: tuple[float, ...] = field(repr=False)

    def as_json(self) -> dict[str, Any]:
        """A plain dictionary, for metrics.jsonl and the resume state; a resumed run writes the same text again."""
        return {**asdict(self), "logs": dict(sorted(self.logs.items())), "losses": list(self.losses)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """What `as_json` gave, back again."""
        return cls(**{**values, "losses": tuple(values["losses"])})


@dataclass(frozen=True)
class Step:
    """One step of one trainer, between its batch and its gradients.

    Attributes:
        pieces: the micro-batches of this process.
        whole: how many images the whole batch has, of all processes.
        sums: this process's share of the loss and of each log.
        auxiliary_losses: the gradients of the method's auxiliary losses, by parameter; those of the loss are with the
            parameters.
    """

    method: Method
    parameters: dict[str, nn.Parameter]
    scale: Callable[[Tensor], Tensor]
    pieces: list[Batch]
    whole: int
    sums: dict[str, Tensor]
    auxiliary_losses: dict[str, dict[str, Tensor]]

    def piece(self, number: int) -> tuple[Tensor, ...]:
        """What `Method.loss` takes of a micro-batch, on the method's device: images, labels, known frozen features."""
        piece, device = self.pieces[number], self.sums["loss"].device
        given = (piece.images, piece.labels, *([] if piece.frozen is None else [piece.frozen]))
        return tuple(one.to(device) for one in given)


class _Epoch:
    """An epoch of one trainer, step by step; what goes wrong with it ends it, and undoes it."""

    def __init__(self, trainer: "Trainer", batches: Batches, on_step: Callable[[StepReport], None]) -> None:
        self._trainer = trainer
        self._batches = iter(batches)
        self._on_step = on_step
        self._before = trainer.begin_epoch()
        self._steps: list[StepReport] = []
        self._error: MapleError | None = None

    def begin_step(self) -> Step | None:
        """The next step, if there is one."""
        if self._error is not None:
            return None
        try:
            batch = next(self._batches, None)
        except MapleError as error:
            self._undo(error)
            return None
        return None if batch is None else self._trainer.begin_step(*batch)

    def finish_step(self, step: Step) -> None:
        """Make the step with the gradients that it has now."""
        try:
            report = self._trainer.finish_step(step)
        except TrainingDivergedError as error:
            self._undo(error)
        else:
            self._steps.append(report)
            self._on_step(report)

    def finish(self) -> EpochReport | MapleError:
        """The report of the epoch, or what went wrong."""
        return self._error or self._trainer.finish_epoch(self._steps)

    def _undo(self, error: MapleError) -> None:
        self._error = error
        self._trainer.restore(*self._before)


def run_epochs(
    parts: Sequence[tuple["Trainer", Batches, Callable[[StepReport], None]]],
) -> list[EpochReport | MapleError]:
    """Train the next epoch of each trainer, side by side: their passes through a frozen tower are made as one.

    Each comes to what it would have come to alone, but for rounding. One that cannot go on gives its error in place of
    a report, and is again as it was before the epoch; the others go on.

    Args:
        parts: a trainer, its batches, and what hears of its steps, as `Trainer.run_epoch` takes them.

    Raises:
        ConfigError: a method has no prompt parameters.
    """
    epochs = [_Epoch(*part) for part in parts]
    while steps := {epoch: step for epoch in epochs if (step := epoch.begin_step()) is not None}:
        accumulate(list(steps.values()))
        for epoch, step in steps.items():
            epoch.finish_step(step)
    return [epoch.finish() for epoch in epochs]


def accumulate(steps: Sequence[Step]) -> None:
    """Accumulate the gradient of each step's mean loss over its whole batch, its logs, and its auxiliary losses.

    Every piece (a micro-batch of a process) is weighted by its part of the whole batch, so the sum over pieces and
    processes is the same whatever the split. The gradients of a method's auxiliary losses are kept apart, by parameter.
    Steps share no parameter, so their gradients do not mix.
    """
    for number in range(max(len(step.pieces) for step in steps)):
        now = [step for step in steps if number < len(step.pieces)]
        given = [step.piece(number) for step in now]
        found = together([partial(step.method.loss, *piece) for step, piece in zip(now, given, strict=True)])
        terms = []
        for step, (loss, logs) in zip(now, found, strict=True):
            weight = len(step.pieces[number]) / step.whole
            terms.append({name: value * weight for name, value in {**logs, "loss": loss}.items()})
            for name, value in terms[-1].items():
                step.sums[name] += value.detach()
        _accumulate_guides(now, terms)
        torch.autograd.backward([step.scale(own["loss"]) for step, own in zip(now, terms, strict=True)])


def _accumulate_guides(steps: Sequence[Step], terms: Sequence[dict[str, Tensor]]) -> None:
    for guide in dict.fromkeys(guide for step in steps for guide in step.auxiliary_losses):
        guided = [(step, own) for step, own in zip(steps, terms, strict=True) if guide in step.auxiliary_losses]
        gradients = torch.autograd.grad(
            [step.scale(own[guide]) for step, own in guided],
            [parameter for step, _ in guided for parameter in step.parameters.values()],
            retain_graph=True,
            materialize_grads=True,
        )
        totals = [total for step, _ in guided for total in step.auxiliary_losses[guide].values()]
        for total, gradient in zip(totals, gradients, strict=True):
            total += gradient
