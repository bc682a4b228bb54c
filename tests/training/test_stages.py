"""A training in stages: each trains its own parameters, with an optimizer, a schedule and epochs of its own."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor

from maple.clip import Backbone
from maple.config import TrainSettings
from maple.data import Batch
from maple.errors import TrainingDivergedError
from maple.methods import Method, build_method
from maple.methods.two_stage import TwoStage
from maple.train import Trainer, learning_rate
from maple.train.stages import stages_of

NAMES = ["cat", "dog", "owl"]
STEPS = 4
ADAMW: dict[str, Any] = {"optimizer": "adamw", "lr": 0.01, "weight_decay": 0.1, "warmup_epochs": 0}
PER_STEP: dict[str, Any] = {**ADAMW, "schedule": "cosine_per_step", "final_lr": 1e-6}


def make(backbone: Backbone, **settings: Any) -> TwoStage:
    description = {"name": "two_stage", "vision_start": 3, "text_start": 2, **settings}
    method = build_method(description, backbone, NAMES, generator=torch.Generator().manual_seed(1))
    assert isinstance(method, TwoStage)
    return method


def trainer_of(method: Method, epochs: int = 2, **changed: Any) -> Trainer:
    settings = TrainSettings(**{**PER_STEP, "epochs": epochs, **changed})
    return Trainer(method, settings, seed=3, steps_per_epoch=STEPS)


def epoch_of(number: int, taken: list[int] | None = None) -> Iterator[tuple[Batch, int]]:
    """Four batches of an epoch; those that a training takes are noted."""
    for index in range(STEPS):
        if taken is not None:
            taken.append(index)
        generator = torch.Generator().manual_seed(10 * number + index)
        yield Batch(torch.randn(3, 3, 32, 32, generator=generator), torch.arange(3)), 3


def train(trainer: Trainer, epochs: int | None = None) -> None:
    while not trainer.finished and trainer.epoch != epochs:
        trainer.run_epoch(epoch_of(trainer.epoch))


def values(method: Method) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in method.prompt_parameters().items()}


@pytest.mark.parametrize(
    ("fraction", "epochs", "ends"),
    [(0.6, 2, [(4, 1), (8, 2)]), (0.7, 2, [(5, 2), (8, 3)]), (0.1, 2, [(0, 0), (8, 2)]), (0.5, 0, [(0, 0), (0, 0)])],
)
def test_steps_and_epochs_of_stages(
    fraction: float, epochs: int, ends: list[tuple[int, int]], backbone: Backbone
) -> None:
    stages = stages_of(make(backbone, fraction=fraction), epochs, STEPS)
    assert [(stage.end_step, stage.end_epoch) for stage in stages] == ends
    assert [(stage.first_step, stage.first_epoch) for stage in stages] == [(0, 0), *ends[:-1]]
    assert stages[1].parameters == ("classifier",)


def test_a_stage_ends_its_epoch_and_the_next_begins_with_another(backbone: Backbone) -> None:
    method = make(backbone, fraction=0.7)  # 5 of 8 steps
    trainer, rates, taken, trained = trainer_of(method), [], [], []
    while not trainer.finished:
        trained.append((method.stage, tuple(trainer.trained)))
        trainer.run_epoch(epoch_of(trainer.epoch, taken), lambda step: rates.append(step.lr))
    assert taken == [0, 1, 2, 3, 0, 0, 1, 2]
    tuned = tuple(name for name in method.prompt_parameters() if name != "classifier")
    assert trained == [(0, tuned), (0, tuned), (1, ("classifier",))]
    assert (trainer.epoch, trainer.epochs) == (3, 3)
    expected = [learning_rate(trainer.settings, 0, k / size) for size in (5, 3) for k in range(size)]
    assert rates == pytest.approx(expected, rel=1e-12)


def test_rates_of_epochs_begin_again(backbone: Backbone) -> None:
    trainer, settings = trainer_of(make(backbone), 5, schedule="cosine", warmup_epochs=1), TrainSettings
    train(trainer)
    each = [settings(**{**ADAMW, "epochs": epochs, "warmup_epochs": 1}) for epochs in (3, 2)]
    expected = [learning_rate(stage, epoch) for stage in each for epoch in range(stage.epochs)]
    assert [report.lr for report in trainer.history] == pytest.approx(expected, rel=1e-12)


def test_what_is_not_trained_is_neither_changed_nor_decayed(backbone: Backbone) -> None:
    method = make(backbone)
    trainer, start = trainer_of(method), values(method)
    train(trainer, epochs=1)
    after_first = values(method)
    with torch.no_grad():
        assert torch.equal(after_first["classifier"], method.text_features()), "what the second stage starts from"
    assert not any(torch.equal(start[name], value) for name, value in after_first.items())
    train(trainer)
    for name, value in values(method).items():
        assert torch.equal(value, after_first[name]) == (name != "classifier"), name
    slots = {name.split("/")[1] for name in trainer.state()[0] if name.startswith("optimizer/")}
    assert slots == {"classifier"}


@pytest.mark.parametrize("settings", [{}, {"tuned": "lora", "dropout": 0.5}], ids=["norms", "dropout"])
def test_resumed_after_any_epoch_to_the_same_bits(settings: dict[str, Any], backbone: Backbone) -> None:
    """In each stage, and where one ends: each has two epochs, the second of which is cut short."""
    straight, states = trainer_of(make(backbone, fraction=0.5, **settings), 3), []
    while not straight.finished:
        states.append(straight.state())
        straight.run_epoch(epoch_of(straight.epoch))
    assert len(states) == straight.epochs == 4
    tensors, plain = straight.state()
    for state in states:
        resumed = trainer_of(make(backbone, fraction=0.5, **settings), 3)
        resumed.restore(*state)
        train(resumed)
        again, same_plain = resumed.state()
        assert same_plain == plain
        assert again.keys() == tensors.keys()
        assert all(torch.equal(again[name], value) for name, value in tensors.items())


def test_divergence_in_the_second_stage_takes_the_epoch_back(backbone: Backbone) -> None:
    method = make(backbone)
    trainer = trainer_of(method)
    train(trainer, epochs=1)
    before = trainer.state()
    broken = [*islice(epoch_of(1), 2), (Batch(torch.full((3, 3, 32, 32), torch.nan), torch.arange(3)), 3)]
    with pytest.raises(TrainingDivergedError, match=r"at step 6 \(epoch 2 of 2\)"):
        trainer.run_epoch(broken)
    assert method.stage == 1
    after = trainer.state()
    assert after[1] == before[1]
    assert all(torch.equal(after[0][name], value) for name, value in before[0].items())
    train(trainer)


def test_micro_batches_change_nothing(backbone: Backbone) -> None:
    whole, pieces = (trainer_of(make(backbone), micro_batch=size) for size in (None, 2))
    for trainer in (whole, pieces):
        train(trainer)
    torch.testing.assert_close(values(pieces.method), values(whole.method), rtol=1e-3, atol=1e-4)


def test_the_best_state_may_be_one_of_the_first_stage(backbone: Backbone) -> None:
    method = make(backbone)
    trainer, images = trainer_of(method, 4), torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    expected = torch.zeros(0)
    while not trainer.finished:
        trainer.run_epoch(epoch_of(trainer.epoch))
        trainer.record_validation(right=10 - trainer.epoch, images=10, loss=1.0)
        if trainer.epoch == 1:
            expected = method.predict_logits(images)
            with torch.no_grad():
                own = method.logits(method.encode_images(images), method.text_features())
            torch.testing.assert_close(expected, own)
    assert not torch.equal(method.predict_logits(images), expected)
    trainer.load_best()
    assert torch.equal(method.predict_logits(images), expected)
