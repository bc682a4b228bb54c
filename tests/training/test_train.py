"""The training loop: its rates, its sums, its precisions, and what it does when a number is not finite."""

import json
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from maple.clip import Backbone
from maple.clip.load import backbone_from_state_dict
from maple.config import TrainSettings
from maple.data import Batch
from maple.errors import CheckpointError, ConfigError, TrainingDivergedError
from maple.methods import Method, MethodSettings, build_method
from maple.prompts import TemplateClasses, l2_normalize
from maple.train import EpochReport, StepReport, Trainer, learning_rate
from maple.train.gradients import accumulate_gradients

NAMES = ["cat", "dog", "owl"]
MAPLE = {"name": "maple", "prompt_depth": 3}


def batches(count: int = 3, size: int = 4) -> list[tuple[Batch, int]]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(size) % 3
    return [(Batch(torch.randn(size, 3, 32, 32, generator=generator), labels), size) for _ in range(count)]


def make(backbone: Backbone, description: dict[str, Any] = MAPLE) -> Method:
    return build_method(description, backbone, NAMES, generator=torch.Generator().manual_seed(1))


def values(method: Method) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in method.prompt_parameters().items()}


def close(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


# --- rates


@pytest.mark.parametrize(("epochs", "warmup"), [(5, 1), (50, 1), (200, 1), (7, 0), (10, 3), (2, 1), (1, 1)])
def test_rates_are_torchs_cosine_after_the_warm_up(epochs: int, warmup: int) -> None:
    settings = TrainSettings(lr=0.0035, epochs=epochs, warmup_epochs=warmup)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.0035)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)
    for epoch in range(epochs):
        if epoch < warmup:
            assert learning_rate(settings, epoch) == 1e-5
            continue
        assert learning_rate(settings, epoch) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        scheduler.step()


def test_a_constant_rate() -> None:
    settings = TrainSettings(lr=0.5, epochs=4, warmup_epochs=1, schedule="constant")
    assert [learning_rate(settings, epoch) for epoch in range(4)] == [1e-5, 0.5, 0.5, 0.5]


def test_each_epoch_runs_at_its_rate(backbone: Backbone) -> None:
    settings = TrainSettings(lr=0.0035, epochs=5)
    trainer, seen = Trainer(make(backbone), settings), []
    while not trainer.finished:
        trainer.run_epoch(batches(2), seen.append)
    assert [step.lr for step in seen] == [learning_rate(settings, epoch) for epoch in range(5) for _ in range(2)]
    assert [step.step for step in seen] == list(range(10))
    assert [report.lr for report in trainer.history] == [learning_rate(settings, epoch) for epoch in range(5)]


def test_a_cosine_of_steps(backbone: Backbone) -> None:
    settings = TrainSettings(lr=0.01, epochs=3, schedule="cosine_per_step", final_lr=0.002)
    trainer, seen = Trainer(make(backbone), settings, steps_per_epoch=2), []
    while not trainer.finished:
        trainer.run_epoch(batches(2), seen.append)
    expected = [0.002 + 0.004 * (1 + math.cos(math.pi * step / 6)) for step in range(6)]
    assert [step.lr for step in seen] == pytest.approx(expected)
    assert [report.lr for report in trainer.history] == pytest.approx(expected[::2])


@pytest.mark.parametrize(
    "description",
    [
        {"name": "clip_lora", "dropout": 0.5},
        {
            "name": "promptsrc",
            "prompts": {"name": "clip_lora", "dropout": 0.5},
            "teacher_templates": ["a photo of a {}."],
        },
        {"name": "dept", "base_method": "clip_lora", "dropout": 0.5},
    ],
    ids=lambda description: description["name"],
)
def test_random_numbers_of_a_step_depend_on_the_seed_and_the_step_alone(
    description: dict[str, Any], backbone: Backbone
) -> None:
    """A resumed run draws what the interrupted one would have drawn; torch's generator is left as it was."""

    def trainer(seed: int) -> Trainer:
        method = make(backbone, description)
        with torch.no_grad():
            for parameter in method.parameters():
                parameter.add_(0.1)
        return Trainer(method, TrainSettings(lr=0.01, epochs=2, warmup_epochs=0), seed=seed)

    before = torch.get_rng_state()
    whole, other = trainer(1), trainer(2)
    losses = [one.run_epoch(batches(2)).losses for one in (whole, other)]
    assert losses[0] != losses[1]
    state = whole.state()
    whole.run_epoch(batches(2))
    torch.rand(3)
    resumed = trainer(1)
    resumed.restore(*state)
    resumed.run_epoch(batches(2))
    assert all(torch.equal(values(whole.method)[name], value) for name, value in values(resumed.method).items())
    torch.set_rng_state(before)
    resumed.step(*(batches(1)[0][0].images, batches(1)[0][0].labels))
    assert torch.equal(torch.get_rng_state(), before)
    assert not resumed.method.training, "dropout is for steps alone"


def test_a_parameter_may_have_a_factor_of_the_learning_rate(backbone: Backbone) -> None:
    """Not in the warm-up. A step of plain SGD is the rate times the gradient."""
    method = make(backbone, {"name": "dept", "prompt_length": 4, "head_lr_factor": 5.0})
    settings = TrainSettings(lr=0.01, epochs=3, warmup_epochs=1, momentum=0, weight_decay=0)
    trainer = Trainer(method, settings)
    rates = (1e-5, 1e-5), (0.01, 0.05), (0.0075, 0.0375)
    for lr, head_lr in rates:
        before = values(method)
        assert trainer.run_epoch(batches(1)).lr == pytest.approx(lr)
        for name, parameter in method.prompt_parameters().items():
            assert parameter.grad is not None
            rate = lr if name.startswith("text_prompt") else head_lr
            torch.testing.assert_close(parameter.detach(), before[name] - rate * parameter.grad)


# --- steps


def test_a_step_is_sgd_with_momentum_and_decay(backbone: Backbone) -> None:
    """Against the formula: v = 0.9 v + g + d p; p = p - lr v."""
    method, twin = make(backbone), make(backbone)
    settings = TrainSettings(lr=0.01, epochs=3, warmup_epochs=0, schedule="constant", weight_decay=0.1)
    trainer, data = Trainer(method, settings), batches()
    velocity: dict[str, Tensor] = {}
    for batch, _ in data:
        twin.zero_grad()
        twin.loss(batch.images, batch.labels)[0].backward()
        for name, parameter in twin.prompt_parameters().items():
            assert parameter.grad is not None
            push = parameter.grad + 0.1 * parameter.detach()
            velocity[name] = push if name not in velocity else 0.9 * velocity[name] + push
            parameter.data -= 0.01 * velocity[name]
    trainer.run_epoch(data)
    close(values(method), values(twin))


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("name", ["maple", "cocoop"])
def test_micro_batches_change_nothing(micro_batch: int, name: str, backbone: Backbone) -> None:
    description = MAPLE if name == "maple" else {"name": name, "meta_net_reduction": 4}
    whole, pieces = make(backbone, description), make(backbone, description)
    settings = TrainSettings(lr=0.02, warmup_epochs=0, batch_size=4)
    one = Trainer(whole, settings).run_epoch(batches())
    other = Trainer(pieces, settings.changed(micro_batch=micro_batch)).run_epoch(batches())
    close(values(whole), values(pieces), 2e-6)
    assert other.losses == pytest.approx(one.losses, rel=1e-5)
    assert other.logs == pytest.approx(one.logs, rel=1e-5)


def test_reports_are_means_over_images(backbone: Backbone) -> None:
    data = [*batches(1, 4), *batches(1, 2)]
    seen: list[StepReport] = []
    report = Trainer(make(backbone), TrainSettings()).run_epoch(data, seen.append)
    assert [step.images for step in seen] == [4, 2]
    assert report.loss == pytest.approx((4 * seen[0].loss + 2 * seen[1].loss) / 6)
    assert report.losses == (seen[0].loss, seen[1].loss)
    assert report.logs["accuracy"] == pytest.approx(sum(s.images * s.logs["accuracy"] for s in seen) / 6)


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_adam_trains(optimizer: str, backbone: Backbone) -> None:
    method = make(backbone)
    trainer = Trainer(
        method, TrainSettings(optimizer=optimizer, lr=0.002, epochs=6, warmup_epochs=0, schedule="constant")
    )
    data = batches(1)
    losses = [trainer.run_epoch(data).loss for _ in range(6)]
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_keeps_prompts_in_float32(precision: str, small_state: dict[str, Tensor]) -> None:
    backbone = backbone_from_state_dict(small_state, precision=precision)
    method = make(backbone)
    before = values(method)
    trainer = Trainer(method, TrainSettings(lr=0.02, epochs=8, warmup_epochs=0, schedule="constant"))
    data = batches(1)
    losses = [trainer.run_epoch(data).loss for _ in range(8)]
    assert losses[-1] < 0.9 * losses[0]
    for name, value in values(method).items():
        assert value.dtype == torch.float32
        assert not torch.equal(value, before[name])
    assert trainer.state()[1]["scaler"].keys() >= ({"scale"} if precision == "fp16" else set())


def test_half_precision_steps_are_those_of_full_precision(small_state: dict[str, Tensor], backbone: Backbone) -> None:
    full, half = make(backbone), make(backbone_from_state_dict(small_state, precision="fp16"))
    settings = TrainSettings(lr=0.01, warmup_epochs=0)
    reports = [Trainer(method, settings).run_epoch(batches()) for method in (full, half)]
    assert reports[1].losses == pytest.approx(reports[0].losses, rel=0.02)


def test_a_share_without_images_in_fp16(small_state: dict[str, Tensor]) -> None:
    """Of a batch of one image on two processes, one process gets nothing."""
    trainer = Trainer(make(backbone_from_state_dict(small_state, precision="fp16")), TrainSettings())
    empty = Batch(torch.empty(0, 3, 32, 32), torch.empty(0, dtype=torch.int64))
    assert trainer.run_epoch([(empty, 1)]).losses == (0.0,)


def test_zero_shot_has_nothing_to_train(backbone: Backbone) -> None:
    trainer = Trainer(make(backbone, {"name": "zero_shot"}), TrainSettings())
    assert trainer.finished
    with pytest.raises(ConfigError, match="zero-shot CLIP has no prompt parameters: there is nothing to train"):
        trainer.run_epoch(batches())


def test_no_epochs_is_finished_at_once(backbone: Backbone) -> None:
    assert Trainer(make(backbone), TrainSettings(epochs=0, warmup_epochs=0)).finished


# --- numbers that are not finite


class Diverging:
    """A method's loss, spoilt at one call."""

    def __init__(self, method: Method, at: int, how: str) -> None:
        self.plain, self.calls, self.at, self.how = method.loss, 0, at, how
        self.parameter = next(iter(method.prompt_parameters().values()))

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss, logs = self.plain(images, labels)
        self.calls += 1
        if self.calls > self.at:
            loss = loss * math.nan if self.how == "loss" else loss + (self.parameter * 0).sqrt().sum()
        return loss, logs


@pytest.mark.parametrize(("how", "found"), [("loss", "the loss is nan"), ("gradient", "a gradient is not finite")])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_divergence_stops_and_takes_the_epoch_back(
    how: str, found: str, optimizer: str, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = make(backbone)
    trainer = Trainer(method, TrainSettings(lr=0.02, epochs=4, optimizer=optimizer))
    trainer.run_epoch(batches(3))
    before, state = values(method), trainer.state()
    monkeypatch.setattr(method, "loss", Diverging(method, 2, how))
    message = (
        rf"diverged: {found} at step 5 \(epoch 2 of 4\) with learning rate 0.02. "
        r"Nothing of this epoch was kept. Try a smaller rate \(train.lr=.*warmup"
    )
    with pytest.raises(TrainingDivergedError, match=message):
        trainer.run_epoch(batches(3))
    assert all(torch.equal(before[name], value) for name, value in values(method).items())
    assert trainer.state()[1] == state[1]
    assert trainer.epoch == 1
    monkeypatch.undo()
    again = make(backbone)
    fresh = Trainer(again, trainer.settings)
    for one in (trainer, fresh, fresh):
        one.run_epoch(batches(3))
    assert all(torch.equal(values(method)[name], value) for name, value in values(again).items())


def test_divergence_in_half_precision_advises_full(
    small_state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    method = make(backbone_from_state_dict(small_state, precision="bf16"))
    monkeypatch.setattr(method, "loss", Diverging(method, 0, "loss"))
    with pytest.raises(TrainingDivergedError, match=r"this run: bf16; backbone.precision=fp32"):
        Trainer(method, TrainSettings()).run_epoch(batches())


def test_fp16_forgives_an_overflow_but_not_endlessly(
    small_state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    method = make(backbone_from_state_dict(small_state, precision="fp16"))
    trainer, before = Trainer(method, TrainSettings()), values(method)
    monkeypatch.setattr(method, "loss", Diverging(method, 0, "gradient"))
    trainer.run_epoch(batches(2))
    assert all(torch.equal(before[name], value) for name, value in values(method).items()), "the steps are left out"
    with pytest.raises(TrainingDivergedError, match=r"a gradient is not finite .*backbone.precision=fp32"):
        trainer.run_epoch(batches(30, 1))


# --- state


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_restored_trainer_goes_on_to_the_same_bits(
    optimizer: str, precision: str, small_state: dict[str, Tensor]
) -> None:
    backbone = backbone_from_state_dict(small_state, precision=precision)
    settings = TrainSettings(lr=0.01, epochs=4, optimizer=optimizer)
    straight = Trainer(make(backbone), settings)
    for _ in range(4):
        straight.run_epoch(batches())
    first = Trainer(make(backbone), settings)
    for _ in range(2):
        first.run_epoch(batches())
    tensors, plain = first.state()
    kept = {name: tensor.clone() for name, tensor in tensors.items()}
    second = Trainer(make(backbone), settings)
    second.restore(tensors, plain)
    for one in (first, second):
        for _ in range(2):
            one.run_epoch(batches())
        ended = one.state()
        assert ended[1] == straight.state()[1]
        assert all(torch.equal(value, straight.state()[0][name]) for name, value in ended[0].items())
    assert all(torch.equal(value, kept[name]) for name, value in tensors.items()), "a state is a copy"


class Centred(Method):
    """Images are centred by a running mean, which is not learned by gradients but changes in each step."""

    title, paper, summary, Settings = "centred CLIP", "none", "a running mean of image features", MethodSettings

    mean: Tensor

    def __init__(self, backbone: Backbone) -> None:
        super().__init__(MethodSettings(), backbone)
        self.strength = nn.Parameter(torch.ones(()))
        self.register_buffer("mean", torch.zeros(backbone.embed_dim))
        self.classes = TemplateClasses(backbone, ["a photo of a {}."])
        self.set_class_names(NAMES)

    def encode_images(self, images: Tensor) -> Tensor:
        features = super().encode_images(images)
        if self.training:
            self.mean.lerp_(features.detach().mean(dim=0), 0.1)
        return l2_normalize(features - self.strength * self.mean)


def test_buffers_that_training_changes_are_resumed(backbone: Backbone) -> None:
    straight, first, second = (Trainer(Centred(backbone), TrainSettings(lr=0.01, epochs=3)) for _ in range(3))
    for _ in range(3):
        straight.run_epoch(batches())
    first.run_epoch(batches())
    tensors, plain = first.state()
    second.restore(tensors, plain)
    for _ in range(2):
        second.run_epoch(batches())
    assert straight.method.mean.abs().sum() > 0
    close(second.method.saved_tensors(), straight.method.saved_tensors(), 0)
    earlier = {name: value for name, value in tensors.items() if not name.startswith("buffers/")}
    Trainer(Centred(backbone), TrainSettings()).restore(earlier, plain)
    for damaged in ({"buffers/mean": torch.zeros(2)}, {"buffers/variance": torch.zeros(2)}):
        with pytest.raises(CheckpointError, match=r"does not fit: buffer (mean|variance) is unknown"):
            second.restore({**tensors, **damaged}, plain)


def test_buffers_are_those_of_the_best_state_and_of_the_last_whole_epoch(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = Centred(backbone)
    trainer = Trainer(method, TrainSettings(lr=0.01, epochs=3))
    trainer.run_epoch(batches())
    trainer.record_validation(3, 3, 0.1)
    best = method.mean.clone()
    trainer.run_epoch(batches())
    last = method.mean.clone()
    assert not torch.equal(best, last)
    monkeypatch.setattr(method, "loss", Diverging(method, 2, "loss"))
    with pytest.raises(TrainingDivergedError):
        trainer.run_epoch(batches())
    assert torch.equal(method.mean, last)
    tensors, plain = trainer.state()
    trainer.load_best()
    assert torch.equal(method.mean, best)
    earlier = {name: value for name, value in tensors.items() if "buffers/" not in name}
    again = Trainer(Centred(backbone), TrainSettings(lr=0.01, epochs=3))
    again.restore(earlier, plain)
    again.load_best()


def test_logs_of_a_loss_may_be_plain_numbers_and_are_named_in_log_names(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = Centred(backbone)
    plain = method.loss

    def logged(**logs: float) -> EpochReport:
        monkeypatch.setattr(method, "loss", lambda images, labels: (plain(images, labels)[0], logs))
        return Trainer(method, TrainSettings(epochs=1)).run_epoch(batches())

    assert logged(cross_entropy=2.0, accuracy=1).logs == {"cross_entropy": 2.0, "accuracy": 1.0}
    written = logged(cross_entropy=math.nan, accuracy=0.5).as_json()
    assert written["logs"] == {"accuracy": 0.5, "cross_entropy": None}
    assert EpochReport.from_json(json.loads(json.dumps(written, allow_nan=False))).as_json() == written
    with pytest.raises(ConfigError, match=r"returns the logs margin, and its log_names are cross_entropy, accuracy; "):
        logged(margin=1.0)


def test_parameters_without_a_gradient_are_refused(backbone: Backbone) -> None:
    method = Centred(backbone)
    method.frozen = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ConfigError, match=r"without a gradient \(frozen.weight, frozen.bias\).*make what is frozen"):
        Trainer(method, TrainSettings())


def test_a_state_of_another_method_is_refused(backbone: Backbone) -> None:
    tensors, plain = Trainer(make(backbone), TrainSettings()).state()
    for description in ({"name": "maple", "prompt_length": 3, "prompt_depth": 3}, {"name": "coop"}):
        with pytest.raises(CheckpointError, match=r"prompt text_prompt.0 is missing or has another shape"):
            Trainer(make(backbone, description), TrainSettings()).restore(tensors, plain)
    with pytest.raises(CheckpointError, match=r"has no training state, but .*average"):
        Trainer(make(backbone), TrainSettings()).restore({**tensors, "method/average": torch.zeros(1)}, plain)


def test_a_method_may_keep_a_state_and_hears_of_epochs(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    method, heard, kept = make(backbone), [], {"average": torch.ones(2)}
    monkeypatch.setattr(method, "on_epoch_end", lambda epoch, epochs: heard.append((epoch, epochs)))
    monkeypatch.setattr(method, "training_state", lambda: kept)
    monkeypatch.setattr(method, "load_training_state", lambda state: heard.append(sorted(state)))
    trainer = Trainer(method, TrainSettings(epochs=3))
    trainer.run_epoch(batches())
    trainer.run_epoch(batches())
    trainer.restore(*trainer.state())
    assert heard == [(0, 3), (1, 3), ["average"]]


def parts(batch: Batch, cuts: Sequence[int]) -> list[Batch]:
    edges = [0, *cuts, len(batch.labels)]
    return [Batch(batch.images[a:b], batch.labels[a:b]) for a, b in pairwise(edges)]


def share_of(trainer: Trainer, batch: Batch, whole: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What one process comes to with its share of a batch: sums of the logs, and gradients."""
    step = trainer.begin_step(batch, whole)
    accumulate_gradients([step])
    return step.sums, {name: value.grad for name, value in trainer.parameters.items() if value.grad is not None}


@pytest.mark.parametrize("cuts", [[2], [1], [0], [4], [1, 1, 3]])
def test_the_gradient_of_a_batch_is_the_sum_over_its_shares(cuts: list[int], backbone: Backbone) -> None:
    """What several processes do, one after the other."""
    (batch, size), *_ = batches(1)
    whole = Trainer(make(backbone), TrainSettings())
    logs, expected = share_of(whole, batch, size)
    shared = Trainer(make(backbone), TrainSettings())
    found = [share_of(shared, share, size) for share in parts(batch, cuts)]
    for name, value in expected.items():
        torch.testing.assert_close(sum(gradients[name] for _, gradients in found), value, rtol=1e-4, atol=1e-5)
    for name, value in logs.items():
        torch.testing.assert_close(torch.stack([sums[name] for sums, _ in found]).sum(), value)
