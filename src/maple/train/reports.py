"""What a training reports of a step, and of an epoch."""

from dataclasses import asdict, dataclass, field
from math import isfinite
from typing import Any, Self


@dataclass(frozen=True)
class StepReport:
    """One step, over the whole batch of all processes.

    Example:
        >>> trainer.step(images, labels).loss
        1.0986
    """

    epoch: int
    step: int
    images: int
    lr: float
    loss: float
    logs: dict[str, float]


@dataclass(frozen=True)
class EpochReport:
    """One epoch: means over its images; `losses` of each step, in order.

    `validation` holds the accuracy and the loss on validation images after the epoch, where these were measured. A log
    that is not finite is null in JSON.

    Example:
        >>> [report.loss for report in trainer.history]
        [1.0986, 0.8721]
    """

    epoch: int
    lr: float
    loss: float
    logs: dict[str, float]
    losses: tuple[float, ...] = field(repr=False)
    validation: dict[str, float] | None = None

    def as_json(self) -> dict[str, Any]:
        """A plain dictionary, for metrics.jsonl and the resume state; a resumed run writes the same text again."""
        # JSON has no other numbers than finite ones; a log that is None was read from it.
        logs = {name: value if value is not None and isfinite(value) else None for name, value in self.logs.items()}
        values = {**asdict(self), "logs": dict(sorted(logs.items())), "losses": list(self.losses)}
        if self.validation is None:
            del values["validation"]
        return values

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """The inverse of `as_json`; KeyError or TypeError if these are not such values."""
        report = cls(**{**values, "losses": tuple(values["losses"])})
        validation = {} if report.validation is None else report.validation
        if not isinstance(report.epoch, int) or not isinstance(report.logs, dict) or not isinstance(validation, dict):
            raise TypeError("its epoch is not a number, or its logs are not a table")
        optional = (*report.logs.values(), *report.losses, *validation.values())
        if not all(isinstance(number, int | float) for number in (report.lr, report.loss)) or not all(
            isinstance(number, int | float | None) for number in optional
        ):
            raise TypeError("a value is not a number")
        return report
