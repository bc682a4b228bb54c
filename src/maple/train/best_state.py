"""The best state of a training, by its accuracy on validation images at a few of its epochs."""

from dataclasses import dataclass, field
from typing import Any, Self

from torch import Tensor

MOST_EVALUATIONS = 10
"""How often a training is scored on validation images at most."""


def is_validation_epoch(epoch: int, epochs: int) -> bool:
    """Whether a training of `epochs` epochs is scored after `epoch` of them: at most ten times, evenly spread.

    The last epoch is always one of them.

    Example:
        >>> [epoch for epoch in range(1, 26) if is_validation_epoch(epoch, 25)]
        [3, 5, 8, 10, 13, 15, 18, 20, 23, 25]
    """
    count = min(epochs, MOST_EVALUATIONS)
    # The n-th of them is the first epoch with at least n / count of the training.
    return epoch > 0 and epoch * count // epochs > (epoch - 1) * count // epochs


@dataclass(frozen=True)
class BestState:
    """The best state so far: that with most validation images right, then the lowest loss on them, then the later.

    Attributes:
        epoch, step: how many epochs and steps it had been trained for.
        right, images: how many of how many validation images it classifies correctly.
        loss: its mean cross-entropy on them.
        compared: the number of states that were scored until now.
        tensors: the state of the prompts and of the method.

    Example:
        >>> trainer.best.epoch, trainer.best.right, trainer.best.images
        (8, 61, 72)
    """

    epoch: int
    step: int
    right: int
    images: int
    loss: float
    compared: int
    tensors: dict[str, Tensor] = field(repr=False, compare=False)

    def is_beaten_by(self, right: int, loss: float) -> bool:
        """Whether a later state with these results is kept in its place."""
        return (right, -loss) >= (self.right, -self.loss)

    def as_json(self) -> dict[str, Any]:
        """Plain values, without the tensors."""
        names = ("epoch", "step", "right", "images", "loss", "compared")
        return {name: getattr(self, name) for name in names}

    @classmethod
    def from_json(cls, values: dict[str, Any], tensors: dict[str, Tensor]) -> Self:
        """The inverse of `as_json`; KeyError or TypeError if these are not such values."""
        best = cls(**values, tensors=tensors)
        counts = (best.epoch, best.step, best.right, best.images, best.compared)
        if not all(isinstance(count, int) for count in counts) or not isinstance(best.loss, int | float):
            raise TypeError("a value of the best state is not a number")
        return best


def describe_kept(kept: dict[str, Any]) -> str:
    """Which state a run has kept and why, in a sentence, from `BestState.as_json` in the information of a prompts file.

    Example:
        >>> describe_kept(read_prompts(path).info["kept"])
        'The state after epoch 8 of 25 (step 32) was kept: it classifies 61 of 72 validation images correctly, ...'
    """
    state = f"The state after epoch {kept.get('epoch')} of {kept.get('epochs')} (step {kept.get('step')})"
    result = f"it classifies {kept.get('right')} of {kept.get('images')} validation images correctly"
    compared = kept.get("compared")
    reason = f"the most of the {compared} states that were compared" if compared != 1 else "no other state was compared"
    return f"{state} was kept: {result}, {reason}."
