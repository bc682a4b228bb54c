"""Gradients of auxiliary losses, combined by the method, are those of the whole batch."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from maple.clip import Backbone, load_clip
from maple.clip.load import backbone_from_state_dict
from maple.config import TrainSettings
from maple.data import Batch
from maple.distributed import Processes
from maple.errors import ConfigError, TrainingDivergedError
from maple.methods import Method, build_method
from maple.train import Trainer
from maple.train.gradients import accumulate_gradients

Gradients = Mapping[str, Mapping[str, Tensor]]


class Guided:
    """Makes a method listen to the gradient of its entropy, and keeps what it hears."""

    def __init__(self, backbone: Backbone, monkeypatch: pytest.MonkeyPatch, *, spoilt_from: float = math.inf) -> None:
        generator = torch.Generator().manual_seed(1)
        description: dict[str, Any] = {"name": "coop", "prompt_length": 3}
        self.method: Method = build_method(description, backbone, ["cat", "dog", "owl"], generator=generator)
        self.heard: list[Gradients] = []
        self.spoilt_from, self.calls = spoilt_from, 0
        for name, value in (
            ("auxiliary_losses", ("entropy",)),
            ("log_names", ("entropy",)),
            ("loss", self.loss),
            ("combine_gradients", self.combine),
        ):
            monkeypatch.setattr(self.method, name, value, raising=False)

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        logits = self.method(images)
        entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()
        self.calls += 1
        if self.calls > self.spoilt_from:
            entropy = entropy + sum((p * 0).sqrt().sum() for p in self.method.parameters())  # infinite gradients
        return F.cross_entropy(logits, labels), {"entropy": entropy}

    def combine(self, gradients: Gradients) -> dict[str, Tensor]:
        self.heard.append({term: {k: v.clone() for k, v in named.items()} for term, named in gradients.items()})
        return {name: value - 2 * gradients["entropy"][name] for name, value in gradients["loss"].items()}

    def true_gradients(self, batch: Batch) -> dict[str, dict[str, Tensor]]:
        loss, logs = self.loss(batch.images, batch.labels)
        parameters = self.method.prompt_parameters()
        found = {
            term: torch.autograd.grad(value, list(parameters.values()), retain_graph=True)
            for term, value in {"loss": loss, **logs}.items()
        }
        return {term: dict(zip(parameters, gradients, strict=True)) for term, gradients in found.items()}


@pytest.fixture
def batch() -> Batch:
    return Batch(torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(2)), torch.arange(5) % 3)


@pytest.mark.parametrize("micro_batch", [None, 1, 2, 5])
def test_a_method_hears_the_gradients_of_the_whole_batch(
    micro_batch: int | None, batch: Batch, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    guided = Guided(backbone, monkeypatch)
    expected = guided.true_gradients(batch)
    trainer = Trainer(guided.method, TrainSettings(micro_batch=micro_batch))
    report = trainer.run_epoch([(batch, 5)])
    (heard,) = guided.heard
    torch.testing.assert_close(heard, expected, rtol=1e-4, atol=1e-5)
    assert report.logs.keys() == {"entropy"}
    for name, parameter in guided.method.prompt_parameters().items():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, heard["loss"][name] - 2 * heard["entropy"][name])


def test_the_step_follows_what_the_method_made_of_them(
    batch: Batch, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    guided = Guided(backbone, monkeypatch)
    (before,) = [p.detach().clone() for p in guided.method.parameters()]
    settings = TrainSettings(lr=0.1, warmup_epochs=0, weight_decay=0.0, schedule="constant")
    Trainer(guided.method, settings).run_epoch([(batch, 5)])
    (after,) = guided.method.parameters()
    ((loss, entropy),) = [(h["loss"]["text_prompt.0"], h["entropy"]["text_prompt.0"]) for h in guided.heard]
    torch.testing.assert_close(after.detach(), before - 0.1 * (loss - 2 * entropy))


def test_shares_of_several_processes_add_up(batch: Batch, backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    guided = Guided(backbone, monkeypatch)
    expected = guided.true_gradients(batch)["entropy"]
    shares = [Batch(batch.images[cut], batch.labels[cut]) for cut in (slice(0, 2), slice(2, 2), slice(2, 5))]
    steps = [Trainer(guided.method, TrainSettings()).begin_step(share, 5) for share in shares]
    for step in steps:
        accumulate_gradients([step])
    for name, value in expected.items():
        torch.testing.assert_close(sum(step.auxiliary["entropy"][name] for step in steps), value, rtol=1e-4, atol=1e-5)


def test_the_scale_of_fp16_is_not_heard(
    batch: Batch, small_state: dict[str, Tensor], backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = Guided(backbone, monkeypatch)
    half = Guided(backbone_from_state_dict(small_state, precision="fp16"), monkeypatch)
    for guided in (full, half):
        Trainer(guided.method, TrainSettings(lr=0.1, warmup_epochs=0)).run_epoch([(batch, 5)])
    for term, named in full.heard[0].items():
        for name, value in named.items():
            largest = float(value.abs().max())
            torch.testing.assert_close(half.heard[0][term][name], value, rtol=0.1, atol=0.05 * largest)
    (one,), (other,) = full.method.parameters(), half.method.parameters()
    torch.testing.assert_close(one, other, rtol=0, atol=0.02 * float(one.detach().abs().max()))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_guide_that_is_not_finite_is_a_gradient_that_is_not_finite(
    precision: str, batch: Batch, small_state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    guided = Guided(backbone_from_state_dict(small_state, precision=precision), monkeypatch, spoilt_from=1)
    trainer = Trainer(guided.method, TrainSettings(lr=0.1, warmup_epochs=0))
    trainer.run_epoch([(batch, 5)])
    before = [p.detach().clone() for p in guided.method.parameters()]
    if precision == "fp16":  # one overflow is forgiven: the step is left out
        trainer.run_epoch([(batch, 5)])
        assert all(torch.equal(p, old) for p, old in zip(guided.method.parameters(), before, strict=True))
    with pytest.raises(TrainingDivergedError, match="a gradient is not finite"):
        trainer.run_epoch([(batch, 5)] * 30)
    assert len(guided.heard) == 1, "the method is not asked about them"


def test_a_step_of_ones_own_is_one_of_an_epoch(batch: Batch, backbone: Backbone) -> None:
    """With the auxiliary_losses: ProGrad's loss alone would lead elsewhere."""
    description: dict[str, Any] = {"name": "prograd", "prompt_length": 4, "teacher_template": "a photo of a {}."}
    methods = [
        build_method(description, backbone, ["cat", "dog", "owl"], generator=torch.Generator().manual_seed(1))
        for _ in range(2)
    ]
    settings = TrainSettings(lr=0.1, warmup_epochs=0, epochs=2)
    own, usual = (Trainer(method, settings) for method in methods)
    for _ in range(2):
        reports = [own.step(batch.images, batch.labels) for _ in range(3)]
        assert own.finish_epoch(reports) == usual.run_epoch([(batch, 5)] * 3)
    assert own.finished
    for mine, theirs in zip(*(method.parameters() for method in methods), strict=True):
        assert torch.equal(mine, theirs)


def test_zero_shot_has_no_step(batch: Batch, backbone: Backbone) -> None:
    trainer = Trainer(build_method({"name": "zero_shot"}, backbone, ["cat", "dog", "owl"]), TrainSettings())
    with pytest.raises(ConfigError, match="nothing to train"):
        trainer.step(batch.images, batch.labels)


def test_a_step_that_diverged_is_followed_by_others(batch: Batch) -> None:
    half = load_clip("maple-tiny", "random:1", precision="fp16")
    trainer = Trainer(build_method({"name": "coop"}, half, ["cat", "dog", "owl"]), TrainSettings())
    images = torch.randn(5, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    for _ in range(2):
        with pytest.raises(TrainingDivergedError):
            trainer.step(images * math.nan, batch.labels)
        assert math.isfinite(trainer.step(images, batch.labels).loss)


def test_a_step_of_several_processes_is_of_the_whole_batch(batch: Batch, backbone: Backbone) -> None:
    """Two that hold the same images, stood in for by sums that double."""

    class Two(Processes):
        def sum_(self, tensors: Iterable[Tensor]) -> None:
            for tensor in tensors:
                tensor *= 2

    methods = [build_method({"name": "coop"}, backbone, ["cat", "dog", "owl"]) for _ in range(2)]
    two, one = (
        Trainer(methods[0], TrainSettings(), Two(0, 2, torch.device("cpu"))),
        Trainer(methods[1], TrainSettings()),
    )
    shared, alone = (trainer.step(batch.images, batch.labels) for trainer in (two, one))
    assert (shared.images, alone.images) == (10, 5)
    assert shared.loss == pytest.approx(alone.loss)
    for mine, theirs in zip(*(method.parameters() for method in methods), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
