"""The gradients of a training step: those of several trainers at once, in pieces, over several processes."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from maple.data import Batch
from maple.errors import ConfigError, shortened_list
from maple.prompts import share_passes

if TYPE_CHECKING:
    from maple.train.trainer import Trainer


@dataclass(frozen=True)
class Step:
    """One step of a trainer, from its batch to its gradients; those of the loss are with the parameters.

    Attributes:
        micro_batches: this process's share of the batch, in pieces.
        images: the number of images in the whole batch, of all processes.
        sums: this process's share of the loss and of each log.
        auxiliary: the gradients of the method's auxiliary losses, by parameter.
    """

    trainer: "Trainer"
    micro_batches: list[Batch]
    images: int
    sums: dict[str, Tensor]
    auxiliary: dict[str, dict[str, Tensor]]


def accumulate_gradients(steps: Sequence[Step]) -> None:
    """Accumulate the gradient of each step's mean loss over its whole batch, its logs, and its auxiliary losses.

    Every micro-batch of every process is weighted by its part of the whole batch, so the sum is the same however the
    batch is divided. Steps share no parameter, so their gradients do not mix.

    Raises:
        ConfigError: a loss returns other logs than the `log_names` of its method.
    """
    for number in range(max(len(step.micro_batches) for step in steps)):
        current = [step for step in steps if number < len(step.micro_batches)]
        losses = []
        for step in current:
            batch, device = step.micro_batches[number], step.sums["loss"].device
            tensors = (batch.images, batch.labels, *(() if batch.frozen is None else (batch.frozen,)))
            compute = partial(step.trainer.method.loss, *(tensor.to(device) for tensor in tensors))
            losses.append(step.trainer.seeded(compute, number))
        terms: list[dict[str, Tensor]] = []
        for step, (loss, logs) in zip(current, share_passes(losses), strict=True):
            method, weight = step.trainer.method, len(step.micro_batches[number]) / step.images
            if logs.keys() != set(method.log_names):
                raise ConfigError(
                    f"the loss of {method.title} returns the logs {shortened_list(logs)}, and its log_names are "
                    f"{shortened_list(method.log_names)}; make log_names = {tuple(logs)!r:.200}"
                )
            terms.append({name: torch.as_tensor(value) * weight for name, value in {**logs, "loss": loss}.items()})
            for name, value in terms[-1].items():
                step.sums[name] += value.detach()
        for auxiliary in dict.fromkeys(name for step in current for name in step.auxiliary):
            having = [(step, term) for step, term in zip(current, terms, strict=True) if auxiliary in step.auxiliary]
            gradients = torch.autograd.grad(
                [step.trainer.scaler.scale(term[auxiliary]) for step, term in having],
                [parameter for step, _ in having for parameter in step.trainer.trained.values()],
                retain_graph=True,
                materialize_grads=True,
            )
            totals = [total for step, _ in having for total in step.auxiliary[auxiliary].values()]
            for total, gradient in zip(totals, gradients, strict=True):
                total += gradient
        torch.autograd.backward(
            [step.trainer.scaler.scale(term["loss"]) for step, term in zip(current, terms, strict=True)]
        )
