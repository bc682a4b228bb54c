"""When the stages of a training begin and end, in steps and in epochs."""

from dataclasses import dataclass

from maple.methods import Method


@dataclass(frozen=True)
class Stage:
    """A stage of a training: the names of its parameters, and its steps and epochs, counted from 0; ends excluded.

    Example:
        >>> Stage(("classifier",), first_step=5, end_step=9, first_epoch=2, end_epoch=4)
    """

    parameters: tuple[str, ...]
    first_step: int
    end_step: int
    first_epoch: int
    end_epoch: int


def stages_of(method: Method, epochs: int, steps_per_epoch: int) -> list[Stage]:
    """The stages of a training of this number of epochs.

    A stage that ends within an epoch ends it, and the next stage begins with another one, so that there may be more
    epochs; the number of steps is the same.

    Example:
        >>> [(stage.end_step, stage.end_epoch) for stage in stages_of(method, epochs=3, steps_per_epoch=3)]
        [(5, 2), (9, 4)]
    """
    stages: list[Stage] = []
    step, epoch, size = 0, 0, max(steps_per_epoch, 1)
    for stage in method.training_stages():
        end = int(epochs * size * stage.end)
        end_epoch = epoch + -(-(end - step) // size)
        stages.append(Stage(stage.parameters, step, end, epoch, end_epoch))
        step, epoch = end, end_epoch
    return stages
