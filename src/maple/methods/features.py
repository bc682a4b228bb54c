"""Features that a method is fitted to, all at once, and how long that takes."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from maple.prompts import l2_normalize


@dataclass(frozen=True)
class Features:
    """Raw image features of the frozen tower, float32, for methods that are fitted to all of them at once.

    Attributes:
        train, train_labels: [V, N, D], V views of each training image, and [N] int64.
        val, val_labels: [M, D], of the validation images as in evaluation, and [M] int64; M may be 0.

    Example:
        >>> Features(torch.rand(1, 4, 512), torch.tensor([0, 0, 1, 1]), torch.rand(2, 512), torch.tensor([0, 1]))
    """

    train: Tensor
    train_labels: Tensor
    val: Tensor
    val_labels: Tensor

    def unit_views(self) -> tuple[Tensor, Tensor]:
        """Unit features of all views [V N, D], each counted as an image, and their labels [V N]."""
        return l2_normalize(self.train.flatten(0, 1)), self.train_labels.repeat(len(self.train))

    def class_sums(self, values: Tensor, classes: int) -> tuple[Tensor, Tensor]:
        """The sums [C, K] of values [V N, K] of `unit_views` by label, and how many each class has [C, 1]."""
        # Views first, and by a product: one member matrix of N images, and the same sum in every run on a GPU.
        members = F.one_hot(self.train_labels, classes).T.to(values.dtype)
        summed = values.unflatten(0, self.train.shape[:2]).sum(dim=0)
        return members @ summed, members.sum(dim=1, keepdim=True) * len(self.train)


def seconds_of(compute: Callable[[], object]) -> float:
    """Seconds of the faster of two calls: the first one allocates memory."""
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        compute()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def seconds_of_steps(run: Callable[[int], object], steps: int, timed: int) -> float:
    """Seconds of `run(steps)`, estimated from those of one step and of `timed` steps."""
    shortest, longer = (seconds_of(partial(run, number)) for number in (1, timed))
    return shortest + (steps - 1) * max(longer - shortest, 0.0) / (timed - 1)
