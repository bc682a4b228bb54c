"""How far the probabilities of a fit can be trusted: their calibration, and accuracy where unsure ones are rejected."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maple.checkpoint import read_prompts
from maple.errors import CheckpointError
from maple.metrics import Coverage, coverage_at
from maple.report import Chapter, Table
from maple.report.predictions import read_predictions
from maple.report.records import EvaluationRecord
from maple.report.tables import Cell, Section

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)


@dataclass(frozen=True)
class Reliability:
    """The calibration of a fit, measured on its held-out images.

    Attributes:
        temperature: by which logits are divided; 1 for no calibration.
        images: how many images it was fitted on, or would have been; None in fits of earlier versions.
        cross_validated: these are training images, each predicted by a model that was not trained on it.
        reason: why there is no temperature; "" where there is one.
        error, uncalibrated_error: expected calibration error, as a fraction, with and without the temperature.
        coverage: at several thresholds of the greatest probability, how many images are answered, and how well.

    Example:
        >>> reliability = read_fit(Path("runs/flowers")).reliability
        >>> print(reliability.summary, reliability.coverage[1].accuracy)
    """

    temperature: float
    images: int | None
    reason: str
    cross_validated: bool
    error: float
    uncalibrated_error: float
    coverage: tuple[Coverage, ...]

    @property
    def summary(self) -> str:
        """The calibration in a sentence or two."""
        if self.temperature != 1:
            which = "images that were neither trained nor tested on"
            if self.cross_validated:
                which = "training images, each predicted by a model that was not trained on it"
            return (
                f"Logits are divided by the temperature {self.temperature:.3g}, fitted on {self.images:,} {which}. "
                f"On the held-out images, the expected calibration error is {100 * self.error:.1f} %; without the "
                f"temperature it is {100 * self.uncalibrated_error:.1f} %."
            )
        why = "."
        if self.images is not None and self.reason:
            why = f" ({self.images:,} images can be used for it, and {self.reason})."
        return (
            f"The probabilities are not calibrated{why} On the held-out images, the expected calibration error is "
            f"{100 * self.error:.1f} %."
        )

    def as_json(self) -> dict[str, Any]:
        """Plain values, for programs."""
        return {
            "temperature": self.temperature,
            "images": self.images,
            "reason": self.reason,
            "cross_validated": self.cross_validated,
            "calibration_error": self.error,
            "uncalibrated_error": self.uncalibrated_error,
            "reject": [
                {
                    "threshold": each.threshold,
                    "images": each.images,
                    "answered": each.kept,
                    "coverage": each.fraction,
                    "accuracy": each.accuracy,
                }
                for each in self.coverage
            ],
        }

    def chapter(self) -> Chapter:
        """The calibration and the thresholds, for the page."""
        rows = [
            (
                f"{each.threshold:g}",
                (
                    Cell(f"{each.kept:,}"),
                    Cell(f"{100 * each.fraction:.1f}"),
                    Cell("-" if each.accuracy is None else f"{100 * each.accuracy:.1f}"),
                ),
            )
            for each in self.coverage
        ]
        columns = ("Threshold", "Images answered", "Coverage", "Accuracy")
        notes = (
            f"In per cent, of {self.coverage[0].images:,} held-out images. With maple predict --reject THRESHOLD, an "
            "image whose greatest probability is below it is answered with none of these; the accuracy is that of "
            "the others.",
        )
        table = Table("Answering only where it is sure", (Section("", columns, tuple(rows)),), notes)
        return Chapter("How far its probabilities can be trusted", [table], [], self.summary)


def read_reliability(folder: Path, evaluation: EvaluationRecord) -> Reliability | None:
    """Measure the calibration of the run in `folder` from its evaluation; None where no predictions were kept.

    Raises:
        CheckpointError: the prompts file or the predictions are damaged.
    """
    try:
        predictions = read_predictions(evaluation)
    except ValueError as error:
        raise CheckpointError(f"{folder}: its predictions cannot be read: {error}") from error
    if predictions is None:
        return None
    stored, row = read_prompts(folder / "prompts.safetensors"), evaluation.row
    calibration: dict[str, Any] = stored.info.get("calibration", {})
    return Reliability(
        temperature=stored.temperature,
        images=(calibration.get("images") or 0) if calibration else None,
        reason=calibration.get("reason") or "",
        cross_validated=calibration.get("cross_validated") is True,
        error=row.calibration_error,
        uncalibrated_error=row.calibration_error if row.uncalibrated_error is None else row.uncalibrated_error,
        coverage=coverage_at(predictions.probabilities[:, 0], predictions.top[:, 0] == predictions.labels, THRESHOLDS),
    )
