"""A method in training: its optimizer, its steps, its state; and the only training loop, `run_epochs`.

Source: SPEC section 4; Dassl.pytorch@c61a1b5 dassl/optim/optimizer.py, lr_scheduler.py, dassl/engine/trainer.py.
Departs: only prompts are given to the optimizer, and they are always float32, whatever the backbone's precision.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from maple.config import TrainSettings
from maple.data import Batch
from maple.data.batches import derive_seed
from maple.distributed import Processes
from maple.errors import CheckpointError, ConfigError, MapleError, TrainingDivergedError, shortened_list
from maple.methods import Method
from maple.train.best_state import BestState
from maple.train.gradients import Step, accumulate_gradients
from maple.train.optimization import learning_rate, make_optimizer
from maple.train.reports import EpochReport, StepReport
from maple.train.stages import stages_of

_Result = TypeVar("_Result")

Batches = Iterable[tuple[Batch, int]]
"""Pairs of this process's share of a batch and the number of images in the whole batch."""


class Trainer:
    """A method in training, and all that a resumed run needs to know.

    Attributes:
        epoch, history: the number of finished epochs, and their reports.
        epochs: the number of epochs of the training: that of the settings, or more where a stage ends within one.
        parameters, trained: all prompt parameters by name, and those of the current stage.
        best: the best of the states that `record_validation` was called for; None before the first.

    Args:
        seed: of the random numbers that a method draws in its steps.
        steps_per_epoch: for a schedule per step and for stages, and only for them.

    Example:
        >>> trainer = Trainer(method, TrainSettings(epochs=5))
        >>> while not trainer.finished:
        ...     report = trainer.run_epoch([(batch, len(batch)) for batch in loader])
    """

    def __init__(
        self,
        method: Method,
        settings: TrainSettings,
        processes: Processes | None = None,
        *,
        seed: int = 0,
        steps_per_epoch: int = 1,
    ) -> None:
        self.method = method
        self.settings = settings
        self._seed = seed
        self.processes = processes or Processes(0, 1, method.backbone.device)
        method.limit_text_memory(None if settings.text_memory is None else int(settings.text_memory * 2**30))
        self.parameters = method.prompt_parameters()
        if frozen := [name for name, parameter in self.parameters.items() if not parameter.requires_grad]:
            # An optimizer would change them, too: by the weight decay.
            raise ConfigError(
                f"{method.title} has parameters without a gradient ({shortened_list(frozen)}), and parameters() are "
                "those that are learned: make what is frozen a buffer, or keep it in a tuple, outside of the module"
            )
        self._stages = stages_of(method, settings.epochs, steps_per_epoch)
        self.epochs = self._stages[-1].end_epoch
        self.epoch = 0
        self.history: list[EpochReport] = []
        self.best: BestState | None = None
        self._step = 0
        half = method.backbone.dtype == torch.float16
        self.scaler = torch.amp.GradScaler(method.backbone.device.type, enabled=half, init_scale=2.0**12)
        self._begin_stage()

    def _begin_stage(self) -> None:
        """Train the parameters of the next step's stage from now on, with an optimizer and a schedule of their own."""
        later = (number for number, stage in enumerate(self._stages) if self._step < stage.end_step)
        self.method.stage = next(later, len(self._stages) - 1)
        self._stage = self._stages[self.method.stage]
        self.trained = {name: self.parameters[name] for name in self._stage.parameters}
        for parameter in self.parameters.values():
            parameter.grad = None
        factors = self.method.learning_rate_factors()
        groups: dict[float, list[Tensor]] = defaultdict(list)
        for name, parameter in self.trained.items():
            groups[factors.get(name, 1.0)].append(parameter)
        described = [{"params": members, "factor": factor} for factor, members in groups.items()]
        self._optimizer = make_optimizer(described, self.settings) if self.trained else None

    @property
    def finished(self) -> bool:
        """Whether all epochs are done (at once, for a method that learns nothing)."""
        return self._optimizer is None or self.epoch >= self.epochs

    def run_epoch(self, batches: Batches, on_step: Callable[[StepReport], None] = lambda _: None) -> EpochReport:
        """Train one epoch on pairs of (this process's share of a batch, number of images in the whole batch).

        Raises:
            ConfigError: the method has no prompt parameters.
            TrainingDivergedError: a loss or a gradient is not finite; the message says where and what to try, and the
                trainer is as it was before the epoch.
        """
        (report,) = run_epochs([(self, batches, on_step)])
        if isinstance(report, MapleError):
            raise report
        return report

    def step(self, images: Tensor, labels: Tensor) -> StepReport:
        """Make one step, for a loop of your own; the learning rate is that of `epoch`.

        Arguments as for `Method.loss`; of several processes, each gives its share of the batch.

        Raises:
            ConfigError: the method has no prompt parameters.
            TrainingDivergedError: the loss or a gradient is not finite; the step is not made.
        """
        self._require_optimizer()
        count = torch.tensor(len(labels), device=self.processes.device)
        self.processes.sum_([count])
        step = self.begin_step(Batch(images, labels), int(count))
        accumulate_gradients([step])
        return self.finish_step(step)

    def begin_step(self, batch: Batch, images: int) -> Step:
        """A step on this process's share of a batch of `images` images; gradients are zero."""
        device, parameters = self.processes.device, self.trained
        self.method.train()
        self.method.on_step_begin(torch.Generator().manual_seed(derive_seed(self._seed, "step", self._step)))
        for parameter in parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        # The scaler initialises itself at its first use, which a process without images would not reach.
        self.scaler.scale(torch.zeros((), device=device))
        size = max(len(batch.labels), 1) if self.settings.micro_batch is None else self.settings.micro_batch
        return Step(
            trainer=self,
            micro_batches=[batch.part(start, size) for start in range(0, len(batch), size)],
            images=images,
            sums={name: torch.zeros((), device=device) for name in ("loss", *self.method.log_names)},
            auxiliary={
                loss: {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
                for loss in self.method.auxiliary_losses
            },
        )

    def finish_step(self, step: Step) -> StepReport:
        """Update the parameters with the gradients that have been accumulated.

        Raises:
            TrainingDivergedError: the loss or a gradient is not finite; the step is not made.
        """
        self.method.eval()
        optimizer, lr = self._require_optimizer(), self.learning_rate()
        for group in optimizer.param_groups:
            group["lr"] = self.learning_rate(group["factor"])
        gradients = {name: p.grad for name, p in self.trained.items() if p.grad is not None}
        auxiliary = [gradient for by_name in step.auxiliary.values() for gradient in by_name.values()]
        self.processes.sum_([*gradients.values(), *auxiliary, *step.sums.values()])
        logs = {name: float(value) for name, value in step.sums.items()}
        loss = logs.pop("loss")
        if not all(bool(gradient.isfinite().all()) for gradient in auxiliary):
            for gradient in gradients.values():
                gradient.fill_(math.nan)  # an overflow of an auxiliary loss is one of the step
        elif auxiliary:
            # The method sees true gradients; what it returns is scaled again, for the scaler to unscale.
            scale = self.scaler.get_scale()
            unscaled = {
                term: {name: gradient / scale for name, gradient in by_name.items()}
                for term, by_name in {"loss": gradients, **step.auxiliary}.items()
            }
            for name, gradient in self.method.combine_gradients(unscaled).items():
                gradients[name].copy_(gradient * scale)
        self.scaler.unscale_(optimizer)
        # In float16 an infinite gradient may only mean that the loss scale must fall once more, unless it is 1 already.
        may_rescale = self.scaler.is_enabled() and self.scaler.get_scale() > 1
        problem = None if math.isfinite(loss) else f"the loss is {loss}"
        if problem is None and not may_rescale and not all(bool(g.isfinite().all()) for g in gradients.values()):
            problem = "a gradient is not finite"
        if problem is None:
            self.scaler.step(optimizer)
        self.scaler.update()  # also after a problem, to be ready for another step, if the caller continues
        if problem is not None:
            precision = self.method.backbone.precision
            advice = "a smaller rate (train.lr=...), a longer warm-up (train.warmup_epochs=2)"
            if precision != "fp32":
                advice += f", or full precision (this run: {precision}; backbone.precision=fp32)"
            raise TrainingDivergedError(
                f"training diverged: {problem} at step {self._step} (epoch {self.epoch + 1} of {self.epochs}) "
                f"with learning rate {lr:g}. Nothing of this epoch was kept. Try {advice}."
            )
        report = StepReport(self.epoch, self._step, step.images, lr, loss, logs)
        self._step += 1
        return report

    def learning_rate(self, factor: float = 1.0) -> float:
        """That of the next step, of parameters with a factor of their own."""
        stage = self._stage
        progress = (self._step - stage.first_step) / max(stage.end_step - stage.first_step, 1)
        epoch, epochs = max(self.epoch - stage.first_epoch, 0), stage.end_epoch - stage.first_epoch
        return learning_rate(self.settings, epoch, min(progress, 1.0), factor, epochs=epochs)

    def seeded(self, compute: Callable[[], _Result], part: int) -> Callable[[], _Result]:
        """The computation of a part of the current step, with random numbers of its own if the method draws some.

        They depend on the seed, the step, the part and the process alone, so that a resumed run draws the same.
        """
        if not self.method.settings.draws_random_numbers:
            return compute
        device = self.processes.device
        seed = derive_seed(self._seed, "step", self._step, part, self.processes.rank)

        def computed() -> _Result:
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                torch.manual_seed(seed)
                return compute()

        return computed

    def finish_epoch(self, steps: Sequence[StepReport]) -> EpochReport:
        """End an epoch of these steps, for a loop of your own."""
        images = sum(step.images for step in steps)
        names = steps[0].logs if steps else {}
        report = EpochReport(
            epoch=self.epoch,
            lr=steps[0].lr if steps else self.learning_rate(),
            loss=sum(step.loss * step.images for step in steps) / max(images, 1),
            logs={name: sum(step.logs[name] * step.images for step in steps) / images for name in names},
            losses=tuple(step.loss for step in steps),
        )
        self.method.on_epoch_end(self.epoch, self.epochs)
        self.epoch += 1
        self.history.append(report)
        if self._step >= self._stage.end_step and self._stage is not self._stages[-1]:
            self._begin_stage()
        return report

    def record_validation(self, right: int, images: int, loss: float) -> EpochReport:
        """Record that the state after the last epoch classifies `right` of `images` validation images correctly.

        The state is kept in `best` if it is the best so far. Returns the report of the epoch, with these values.

        Args:
            loss: the mean cross-entropy on these images.
        """
        compared = 1 if self.best is None else self.best.compared + 1
        if self.best is None or self.best.is_beaten_by(right, loss):
            tensors = on_cpu(self._learned_state())
            self.best = BestState(self.epoch, self._step, right, images, loss, compared, tensors)
        else:
            self.best = replace(self.best, compared=compared)
        validation = {"accuracy": right / images, "loss": loss}
        self.history[-1] = replace(self.history[-1], validation=validation)
        return self.history[-1]

    @torch.no_grad()
    def load_best(self) -> None:
        """Set the prompts to those of `best`, if there is one; for the end of a training.

        Raises:
            CheckpointError: they were restored from a file, and do not fit the method.
        """
        if self.best is None:
            return
        for name, parameter in self.parameters.items():
            parameter.copy_(self.best.tensors[f"prompts/{name}"])
        self._restore_buffers(self.best.tensors)
        self.method.load_training_state(below("method/", self.best.tensors))

    def steps_of_epoch(
        self, batches: Batches, on_step: Callable[[StepReport], None]
    ) -> Generator[Step, None, EpochReport | MapleError]:
        """Train the next epoch, yielding each step for its gradients to be accumulated.

        Returns its report; or the error that ended it, with the trainer as it was before.
        """
        self._require_optimizer()
        before = self.state()
        reports: list[StepReport] = []
        try:
            iterator = iter(batches)
            while True:
                with self.processes.failing_together():
                    upcoming = next(iterator, None)
                if upcoming is None:
                    break
                step = self.begin_step(*upcoming)
                yield step
                reports.append(self.finish_step(step))
                on_step(reports[-1])
                if len(self._stages) > 1 and self._step == self._stage.end_step:
                    break  # the next stage begins with an epoch
        except MapleError as error:
            self.method.eval()
            self.restore(*before)
            return error
        return self.finish_epoch(reports)

    def _require_optimizer(self) -> torch.optim.Optimizer:
        if self._optimizer is None:
            raise ConfigError(f"{self.method.title} has no prompt parameters: there is nothing to train, only evaluate")
        return self._optimizer

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that a resumed run needs: (copies of tensors by name, plain values).

        No random state: random numbers are derived from the seed, the epoch and the position of a sample.
        """
        tensors = self._learned_state()
        for name, parameter in self.parameters.items():
            slots = {} if self._optimizer is None else self._optimizer.state.get(parameter, {})
            tensors |= {f"optimizer/{name}/{key}": value for key, value in slots.items() if isinstance(value, Tensor)}
        history = [report.as_json() for report in self.history]
        scaler = self.scaler.state_dict() if self.scaler.is_enabled() else {}
        values: dict[str, Any] = {"epoch": self.epoch, "step": self._step, "history": history, "scaler": scaler}
        if self.best is not None:
            values["best"] = self.best.as_json()
            tensors |= {f"best/{name}": value for name, value in self.best.tensors.items()}
        return on_cpu(tensors), values

    def _learned_state(self) -> dict[str, Tensor]:
        """What decides the predictions: the prompts, saved buffers, and what the method has in addition to them."""
        saved = self.method.saved_tensors()
        return {
            **{f"prompts/{name}": value for name, value in self.parameters.items()},
            **{f"buffers/{name}": value for name, value in saved.items() if name not in self.parameters},
            **{f"method/{name}": value for name, value in self.method.training_state().items()},
        }

    def _restore_buffers(self, tensors: Mapping[str, Tensor]) -> None:
        """Set those of `_learned_state`; earlier versions stored none, and then they are left alone."""
        buffers = self.method.saved_tensors()
        for name, saved in below("buffers/", tensors).items():
            buffer = buffers.get(name)
            if buffer is None or (saved.shape, saved.dtype) != (buffer.shape, buffer.dtype):
                raise CheckpointError(f"the resume state does not fit: buffer {name} is unknown or of another kind")
            buffer.copy_(saved)

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Continue from the result of `state`.

        Raises:
            CheckpointError: the tensors are not those of this method and optimizer.
        """
        self.epoch, self._step = values["epoch"], values["step"]
        if not all(isinstance(count, int) and count >= 0 for count in (self.epoch, self._step)):
            raise CheckpointError(f"the resume state does not fit: epoch {self.epoch!r}, step {self._step!r}")
        self._begin_stage()
        for name, parameter in self.parameters.items():
            saved = tensors.get(f"prompts/{name}")
            state = below(f"optimizer/{name}/", tensors)
            shapes = {value.shape for value in state.values() if value.numel() != 1}
            if saved is None or {saved.shape, *shapes} != {parameter.shape}:
                raise CheckpointError(f"the resume state does not fit: prompt {name} is missing or has another shape")
            if odd := [str(value.dtype) for value in (saved, *state.values()) if not value.is_floating_point()]:
                raise CheckpointError(f"the resume state does not fit: prompt {name} has the type {odd[0]}")
            parameter.copy_(saved)
            if self._optimizer is not None and name in self.trained:
                # Adam counts its steps on the CPU; its other tensors are where their parameter is.
                self._optimizer.state[parameter] = {
                    key: value.to("cpu" if key == "step" else parameter.device, copy=True)
                    for key, value in state.items()
                }
        self._restore_buffers(tensors)
        self.method.load_training_state(below("method/", tensors))
        self.best = None
        if "best" in values:
            best = below("best/", tensors)
            expected = {name: value.shape for name, value in self._learned_state().items()}
            if not below("buffers/", best):  # of an earlier version
                expected = {name: shape for name, shape in expected.items() if not name.startswith("buffers/")}
            if {name: value.shape for name, value in best.items()} != expected:
                raise CheckpointError("the resume state does not fit: the best state has other tensors or shapes")
            self.best = BestState.from_json(values["best"], best)
        self.history = [EpochReport.from_json(report) for report in values["history"]]
        if values["scaler"]:
            self.scaler.load_state_dict(values["scaler"])


def on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of tensors on the CPU, which later steps do not change."""
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}


def below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with the prefix, under the rest of their names."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def run_epochs(
    parts: Sequence[tuple[Trainer, Batches, Callable[[StepReport], None]]],
) -> list[EpochReport | MapleError]:
    """Train the next epoch of several trainers, side by side: they share their passes through the frozen towers.

    Each gets the result that it would have got alone, but for rounding. One that cannot continue gives its error in
    place of a report, and is as it was before the epoch; the others continue.

    Args:
        parts: trainers, each with the arguments of `Trainer.run_epoch`.

    Raises:
        ConfigError: a method has no prompt parameters.

    Example:
        >>> run_epochs([(trainer, batches, print) for trainer, batches in zip(trainers, batches_of_each)])
    """
    results: dict[int, EpochReport | MapleError] = {}
    epochs = [trainer.steps_of_epoch(batches, on_step) for trainer, batches, on_step in parts]
    while True:
        steps = []
        for number, epoch in enumerate(epochs):
            if number in results:
                continue
            try:
                steps.append(next(epoch))
            except StopIteration as end:
                results[number] = end.value
        if not steps:
            return [results[number] for number in range(len(parts))]
        accumulate_gradients(steps)
