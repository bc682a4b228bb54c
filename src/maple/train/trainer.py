"""A method under training: its optimiser, its steps, its state.

Source: SPEC section 4; Dassl.pytorch@c61a1b5 dassl/optim/optimizer.py, lr_scheduler.py, dassl/engine/trainer.py.
Departs: only prompts are given to the optimiser, and they are always float32, whatever the backbone's precision.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from maple.config import TrainSettings
from maple.data import Batch
from maple.distributed import Processes
from maple.errors import CheckpointError, ConfigError, MapleError, TrainingDivergedError
from maple.methods import Method
from maple.train.epochs import Batches, EpochReport, Step, StepReport, accumulate, run_epochs

# Below it an infinite gradient is no overflow of the scaled loss any more.
_SMALLEST_SCALE = 1.0


def learning_rate(settings: TrainSettings, epoch: int) -> float:
    """The rate of a whole epoch (from 0): a constant warm-up, then a cosine over the epochs.

    The cosine counts from the first epoch after the warm-up, with T_max = epochs, so it does not reach 0: the last of
    five epochs of MaPLe runs at 0.35 of the rate. Source: Dassl.pytorch@c61a1b5 dassl/optim/lr_scheduler.py:38-57
    (the wrapped scheduler first steps when the warm-up is over).
    """
    if epoch < settings.warmup_epochs:
        return settings.warmup_lr
    if settings.schedule == "constant":
        return settings.lr
    return settings.lr * 0.5 * (1 + math.cos(math.pi * (epoch - settings.warmup_epochs) / settings.epochs))


def make_optimizer(parameters: Iterable[Tensor], settings: TrainSettings) -> torch.optim.Optimizer:
    """SGD with momentum (no Nesterov), Adam or AdamW; weight decay on every prompt parameter."""
    if settings.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=settings.lr, weight_decay=settings.weight_decay)
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay)
    return torch.optim.SGD(
        parameters, lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay, nesterov=False
    )


class Trainer:
    """A method under training, and all that a resumed run needs to know.

    Attributes:
        epoch: how many epochs are finished.
        history: their reports.
    """

    def __init__(self, method: Method, settings: TrainSettings, processes: Processes | None = None) -> None:
        self.method = method
        self.settings = settings
        self.processes = processes or Processes(0, 1, method.backbone.device)
        method.limit_text_memory(None if settings.text_memory is None else int(settings.text_memory * 2**30))
        self.parameters = method.prompt_parameters()
        self.epoch = 0
        self.history: list[EpochReport] = []
        self._step = 0
        half = method.backbone.dtype == torch.float16
        self._scaler = torch.amp.GradScaler(method.backbone.device.type, enabled=half, init_scale=2.0**12)
        self._optimizer = make_optimizer(self.parameters.values(), settings) if self.parameters else None

    @property
    def finished(self) -> bool:
        """Whether all epochs are done (at once, for a method that learns nothing)."""
        return self._optimizer is None or self.epoch >= self.settings.epochs

    def run_epoch(self, batches: Batches, on_step: Callable[[StepReport], None] = lambda _: None) -> EpochReport:
        """Train one epoch on (this process's share of a batch, length of the whole batch) pairs.

        Raises:
            ConfigError: the method has no prompt parameters.
            TrainingDivergedError: a loss or a gradient is not finite; it says where and what to try, and everything
                is again as it was before the epoch.
        """
        (report,) = run_epochs([(self, batches, on_step)])
        if isinstance(report, MapleError):
            raise report
        return report

    def step(self, images: Tensor, labels: Tensor) -> StepReport:
        """One step of a loop of your own, with all that the method asks of a step; the rate is that of `epoch`.

        Args:
            images: [B, 3, R, R], normalised; of several processes, each gives its share of the batch.
            labels: [B] int64, indices into the method's class names.

        Raises:
            ConfigError: the method has no prompt parameters.
            TrainingDivergedError: the loss or a gradient is not finite; the step is not made.
        """
        self._require_optimizer()
        self.method.train()
        whole = torch.tensor(len(labels), device=self.processes.device)
        self.processes.sum_([whole])
        step = self.begin_step(Batch(images, labels), int(whole))
        accumulate([step])
        return self.finish_step(step)

    def begin_epoch(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Make ready for the steps of the next epoch; return the state before it.

        Raises:
            ConfigError: the method has no prompt parameters.
        """
        self._require_optimizer()
        self.method.train()
        return self.state()

    def begin_step(self, batch: Batch, whole: int) -> Step:
        """A step on this process's share of a batch of `whole` images; gradients are zero."""
        device, parameters = self.processes.device, self.parameters
        for parameter in parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        # The scaler wakes up at its first use, which a process without images would never come to.
        self._scaler.scale(torch.zeros((), device=device))
        size = max(len(batch.labels), 1) if self.settings.micro_batch is None else self.settings.micro_batch
        return Step(
            method=self.method,
            parameters=parameters,
            scale=self._scaler.scale,
            pieces=[batch.part(start, size) for start in range(0, len(batch), size)],
            whole=whole,
            sums={name: torch.zeros((), device=device) for name in ("loss", *self.method.log_names)},
            auxiliary_losses={
                guide: {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
                for guide in self.method.auxiliary_losses
            },
        )

    def finish_step(self, step: Step) -> StepReport:
        """Make a step with the gradients that have been accumulated.

        Raises:
            TrainingDivergedError: the loss or a gradient is not finite; the step is not made.
        """
        optimizer, rate = self._require_optimizer(), learning_rate(self.settings, self.epoch)
        for group in optimizer.param_groups:
            group["lr"] = rate
        gradients = [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]
        guiding = [gradient for named in step.auxiliary_losses.values() for gradient in named.values()]
        self.processes.sum_([*gradients, *guiding, *step.sums.values()])
        logs = {name: float(value) for name, value in step.sums.items()}
        loss = logs.pop("loss")
        self._steer(step.auxiliary_losses)
        self._scaler.unscale_(optimizer)
        try:
            self._refuse_non_finite(loss, gradients, rate)
        except TrainingDivergedError:
            self._scaler.update()  # ready for another step, if the caller goes on
            raise
        self._scaler.step(optimizer)
        self._scaler.update()
        report = StepReport(self.epoch, self._step, step.whole, rate, loss, logs)
        self._step += 1
        return report

    def finish_epoch(self, steps: Sequence[StepReport]) -> EpochReport:
        """An epoch has gone by in these steps."""
        images = sum(step.images for step in steps)
        names = steps[0].logs if steps else {}
        report = EpochReport(
            epoch=self.epoch,
            lr=learning_rate(self.settings, self.epoch),
            loss=sum(step.loss * step.images for step in steps) / max(images, 1),
            logs={name: sum(step.logs[name] * step.images for step in steps) / images for name in names},
            losses=tuple(step.loss for step in steps),
        )
        self.method.on_epoch_end(self.epoch, self.settings.epochs)
        self.epoch += 1
        self.history.append(report)
        return report

    def _require_optimizer(self) -> torch.optim.Optimizer:
        if self._optimizer is None:
            raise ConfigError(f"{self.method.title} has no prompt parameters: there is nothing to train, only evaluate")
        return self._optimizer

    def _steer(self, auxiliary_losses: dict[str, dict[str, Tensor]]) -> None:
        """Replace the gradient of the loss by what the method makes of it and of its auxiliary losses.

        The method sees true gradients; what it returns is scaled again, for the scaler to take it from there.
        """
        if not auxiliary_losses:
            return
        gradients = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        if not all(bool(value.isfinite().all()) for named in auxiliary_losses.values() for value in named.values()):
            for gradient in gradients.values():
                gradient.fill_(math.nan)  # an overflow of a guide is one of the step
            return
        scale = self._scaler.get_scale()
        terms = {
            term: {name: value / scale for name, value in named.items()}
            for term, named in {"loss": gradients, **auxiliary_losses}.items()
        }
        for name, value in self.method.combine_gradients(terms).items():
            gradients[name].copy_(value * scale)

    def _may_rescale(self) -> bool:
        """Whether an infinite gradient only means that the loss scale of fp16 has to fall once more."""
        return self._scaler.is_enabled() and self._scaler.get_scale() > _SMALLEST_SCALE

    def _refuse_non_finite(self, loss: float, gradients: list[Tensor], rate: float) -> None:
        bad = None
        if not math.isfinite(loss):
            bad = f"the loss is {loss}"
        elif not self._may_rescale() and not all(bool(g.isfinite().all()) for g in gradients):
            bad = "a gradient is not finite"
        if bad is None:
            return
        precision = self.method.backbone.precision
        advice = "a smaller rate (--set train.lr=...), a longer warm-up (--set train.warmup_epochs=2)"
        if precision != "fp32":
            advice += f", or full precision (this run: {precision}; --set backbone.precision=fp32)"
        raise TrainingDivergedError(
            f"training diverged: {bad} at step {self._step} (epoch {self.epoch + 1} of {self.settings.epochs}) with "
            f"learning rate {rate:g}. Nothing of this epoch was kept. Try {advice}."
        )

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that a resumed run needs: (copies of tensors by name, plain values).

        Random numbers need none: they are derived from the seed, the epoch and the position of a sample.
        """
        tensors = {f"prompts/{name}": _copy(value) for name, value in self.parameters.items()}
        tensors |= {f"method/{name}": _copy(value) for name, value in self.method.training_state().items()}
        if self._optimizer is not None:
            for name, parameter in self.parameters.items():
                for key, value in self._optimizer.state.get(parameter, {}).items():
                    if isinstance(value, Tensor):
                        tensors[f"optimizer/{name}/{key}"] = _copy(value)
        history = [report.as_json() for report in self.history]
        scaler = self._scaler.state_dict() if self._scaler.is_enabled() else {}
        return tensors, {"epoch": self.epoch, "step": self._step, "history": history, "scaler": scaler}

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Go on from what `state` returned.

        Raises:
            CheckpointError: the tensors are not those of this method and optimiser.
        """
        for name, parameter in self.parameters.items():
            saved = tensors.get(f"prompts/{name}")
            if saved is None or saved.shape != parameter.shape:
                raise CheckpointError(f"the resume state does not fit: prompt {name} is missing or has another shape")
            parameter.copy_(saved)
            prefix = f"optimizer/{name}/"
            if self._optimizer is not None:
                self._optimizer.state[parameter] = {
                    key.removeprefix(prefix): _place(key, value, parameter)
                    for key, value in tensors.items()
                    if key.startswith(prefix)
                }
        prefix = "method/"
        self.method.load_training_state(
            {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        )
        self.epoch, self._step = values["epoch"], values["step"]
        self.history = [EpochReport.from_json(report) for report in values["history"]]
        if values["scaler"]:
            self._scaler.load_state_dict(values["scaler"])


def _copy(value: Tensor) -> Tensor:
    return value.detach().to("cpu", copy=True).contiguous()


def _place(key: str, value: Tensor, parameter: Tensor) -> Tensor:
    """Adam counts its steps on the CPU; everything else of the optimiser lives beside its parameter."""
    return value.clone() if key.endswith("/step") else value.to(parameter.device, copy=True)
