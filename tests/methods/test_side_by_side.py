"""Runs of one method side by side, asked of every method: each comes to what it comes to alone."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from variants import LEARNING, NAMES, VARIANTS

from maple.clip import Backbone, LayerEdit
from maple.config import TrainSettings
from maple.data import Batch
from maple.methods import Method, build_method
from maple.prompts import encode
from maple.train import EpochReport, Trainer, run_epochs

SEEDS = (1, 2, 3)


def batches(seed: int, epoch: int, dtype: torch.dtype) -> list[tuple[Batch, int]]:
    """Of another number, and the last one short, with every seed."""
    generator = torch.Generator().manual_seed(10 * seed + epoch)
    sizes = [4] * (seed - 1) + [seed]
    return [
        (Batch(torch.randn(size, 3, 32, 32, generator=generator).to(dtype), torch.arange(size) % len(NAMES)), size)
        for size in sizes
    ]


def trainers(variant: str, backbone: Backbone, **train: Any) -> list[Trainer]:
    """Of other prompts and another learning rate with every seed, in the backbone's precision."""
    description = dict(VARIANTS[variant])
    if description["name"] == "promptsrc":
        description["teacher_templates"] = ["a photo of a {}.", "a sketch of the {}!"]  # two of sixty, to be quick
    made = []
    for seed in SEEDS:
        generator = torch.Generator().manual_seed(seed)
        method = build_method(description, backbone, NAMES, generator=generator)
        with torch.no_grad():
            for parameter in method.parameters():
                # Away from where ProGrad's teacher is, whose gradient has no direction there but that of rounding.
                parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
        if backbone.dtype == torch.float64:
            widen(method)
        settings = TrainSettings(**{"lr": 0.01 * seed, "epochs": 2, "warmup_epochs": 0, **train})
        made.append(Trainer(method, settings))
    return made


def widen(method: Method) -> None:
    """Put everything of a method into float64, so that rounding hides nothing."""
    method.double()
    for value in method.training_state().values():
        value.data = value.data.double()


def train_alone(made: Sequence[Trainer], dtype: torch.dtype) -> None:
    for seed, trainer in zip(SEEDS, made, strict=True):
        for epoch in range(2):
            trainer.run_epoch(batches(seed, epoch, dtype))


def train_side_by_side(made: Sequence[Trainer], dtype: torch.dtype) -> None:
    for epoch in range(2):
        parts = [(t, batches(seed, epoch, dtype), lambda _: None) for seed, t in zip(SEEDS, made, strict=True)]
        assert all(isinstance(report, EpochReport) for report in run_epochs(parts))


def close(one: Trainer, other: Trainer, tolerance: float) -> None:
    """Prompts, state of the optimiser, averages and history."""
    (tensors, values), (expected, plain) = one.state(), other.state()
    torch.testing.assert_close(tensors, expected, rtol=tolerance, atol=tolerance)
    assert values.keys() == plain.keys()
    assert (values["epoch"], values["step"]) == (plain["epoch"], plain["step"])
    for report, wanted in zip(values["history"], plain["history"], strict=True):
        assert report["losses"] == pytest.approx(wanted["losses"], rel=tolerance, abs=tolerance)
        assert report["logs"] == pytest.approx(wanted["logs"], rel=tolerance, abs=tolerance)
        assert (report["epoch"], report["lr"]) == (wanted["epoch"], wanted["lr"])


@pytest.mark.parametrize("variant", LEARNING)
def test_each_comes_to_what_it_comes_to_alone(variant: str, double_backbone: Backbone) -> None:
    alone, beside = trainers(variant, double_backbone), trainers(variant, double_backbone)
    train_alone(alone, torch.float64)
    train_side_by_side(beside, torch.float64)
    for one, other in zip(beside, alone, strict=True):
        assert all(value.dtype == torch.float64 for value in one.parameters.values())
        close(one, other, 1e-9)


@pytest.mark.parametrize(("variant", "optimizer"), [("maple", "adamw"), ("promptsrc", "sgd"), ("prograd", "sgd")])
def test_in_float32_they_differ_by_rounding(variant: str, optimizer: str, backbone: Backbone) -> None:
    train = {"optimizer": optimizer, "lr": 0.002, "micro_batch": 3}
    alone, beside = (trainers(variant, backbone, **train) for _ in range(2))
    train_alone(alone, torch.float32)
    train_side_by_side(beside, torch.float32)
    for one, other in zip(beside, alone, strict=True):
        close(one, other, 1e-4)


@pytest.mark.parametrize("variant", LEARNING)
def test_their_passes_are_made_as_one(variant: str, backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, list[int]] = {"text": [], "image": []}
    text, image = encode._encode_text, encode._encode_image

    def count_text(tower: Any, sentences: Any, edits: Sequence[LayerEdit], limit: int | None) -> Tensor:
        made["text"] += [len(edit.prompt) for edit in edits[:1] if edit.prompt is not None]
        return text(tower, sentences, edits, limit)

    def count_image(tower: Any, images: Tensor, edits: Sequence[LayerEdit], **rows: Any) -> Tensor:
        made["image"].append(len(images))
        return image(tower, images, edits, **rows)

    ready = trainers(variant, backbone)
    monkeypatch.setattr(encode, "_encode_text", count_text)
    monkeypatch.setattr(encode, "_encode_image", count_image)
    batch = (Batch(torch.randn(2, 3, 32, 32), torch.tensor([0, 1])), 2)
    assert all(isinstance(report, EpochReport) for report in run_epochs([(t, [batch], lambda _: None) for t in ready]))
    method = ready[0].method
    learns_words = any(edit.prompt is not None for edit in method.text_edits())
    assert made["text"] == ([6 if method.classes_depend_on_image else 3] if learns_words else [])
    frozen = [6] if method.needs_frozen_features else []
    if all(edit.only_prompts for edit in method.vision_edits()):
        assert made["image"] == [6, *frozen]
    else:  # blocks that a run has changed are its own; a loss may need several passes
        assert made["image"] in ([2] * 3 + frozen, [2] * 6 + frozen)
