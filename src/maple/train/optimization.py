"""The optimizer of a training, and its learning rate.

Source: SPEC section 4; Dassl.pytorch@c61a1b5 dassl/optim/optimizer.py, lr_scheduler.py.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from maple.config import TrainSettings

Parameters = Iterable[Tensor] | Iterable[dict[str, Any]]
"""Those of an optimizer, or groups of them as its class takes them."""


def learning_rate(
    settings: TrainSettings, epoch: int, progress: float = 0.0, factor: float = 1.0, *, epochs: int | None = None
) -> float:
    """The learning rate of an epoch (from 0): a constant warm-up, then a cosine over the epochs.

    The cosine counts from the first epoch after the warm-up, with T_max = epochs, so it does not reach 0: the last of
    five epochs of MaPLe runs at 0.35 of the rate. Source: Dassl.pytorch@c61a1b5 dassl/optim/lr_scheduler.py:38-57
    (the wrapped scheduler first steps when the warm-up is over). With the schedule per step, it is a half cosine from
    `lr` to `final_lr`, of which `progress` is the part that has passed. A parameter may have a `factor` of `lr`, and a
    stage of a training `epochs` of its own.

    Example:
        >>> [round(learning_rate(TrainSettings(lr=0.1), epoch), 5) for epoch in range(5)]
        [1e-05, 0.1, 0.09045, 0.06545, 0.03455]
    """
    lr = factor * settings.lr
    if settings.schedule == "cosine_per_step":
        return settings.final_lr + (lr - settings.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))
    if epoch < settings.warmup_epochs:
        return settings.warmup_lr
    if settings.schedule == "constant":
        return lr
    return lr * 0.5 * (1 + math.cos(math.pi * (epoch - settings.warmup_epochs) / (epochs or settings.epochs)))


def make_optimizer(parameters: Parameters, settings: TrainSettings) -> torch.optim.Optimizer:
    """SGD with momentum (no Nesterov), Adam or AdamW; weight decay on every parameter, or every group of them."""
    lr, decay = settings.lr, settings.weight_decay
    if settings.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=lr, eps=settings.epsilon, weight_decay=decay)
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=lr, eps=settings.epsilon, weight_decay=decay)
    return torch.optim.SGD(parameters, lr=lr, momentum=settings.momentum, weight_decay=decay, nesterov=False)
