"""Runs of methods that are fitted to features: from images to a row, interrupted, and without validation images."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from maple.checkpoint import read_prompts
from maple.config import RunSettings
from maple.errors import ConfigError, UnlearnedClassesError
from maple.methods.tip_adapter import TipAdapter
from maple.runs import TrainProgress, content_name, evaluate_run, train_run
from maple.runs.spec import relevant
from maple.runs.training_data import TrainingData
from maple.sweeps import SweepSettings, plan_sweep, run_sweep
from maple.train import EpochReport

FITTED: dict[str, dict[str, Any]] = {
    "linear_probe": {"method": {"name": "linear_probe"}, "train": {"epochs": 0, "views": 0}},
    "tip_adapter": {"method": {"name": "tip_adapter"}, "train": {"epochs": 0, "views": 3}},
    "tip_adapter-f": {
        "method": {"name": "tip_adapter", "learn_keys": True},
        "train": {"epochs": 4, "views": 3, "optimizer": "adamw", "batch_size": 8, "warmup_epochs": 0},
    },
    "taskres": {
        "method": {"name": "taskres"},
        "train": {"epochs": 4, "views": 2, "optimizer": "adam", "batch_size": 8, "warmup_epochs": 0},
    },
    "clap": {"method": {"name": "clap"}, "train": {"epochs": 4, "views": 2, "batch_size": 8, "lr": 0.1}},
    "lpplusplus": {"method": {"name": "lpplusplus", "epochs": 20}, "train": {"epochs": 0, "views": 1}},
    "gda": {"method": {"name": "gda"}, "train": {"epochs": 0, "views": 3}},
}
# What is selected on validation images.
CHOSEN: dict[str, set[str]] = {
    "linear_probe": {"inverse_regularisation"},
    "taskres": set(),
    "clap": set(),
    "lpplusplus": {"epoch"},
    "gda": {"alpha"},
}


@pytest.fixture
def images(make_images: Callable[..., Path]) -> Path:
    """Four classes with train, val and test folders."""
    root = make_images(train=4, test=4)
    for folder in (root / "test").iterdir():
        (root / "val" / folder.name).mkdir(parents=True)
        for picture in sorted(folder.iterdir())[:2]:
            shutil.move(picture, root / "val" / folder.name / picture.name)
    return root


def settings_of(kind: str, images: Path, **data: Any) -> RunSettings:
    backbone = {"name": "maple-tiny", "pretrained": "random"}
    return RunSettings(backbone=backbone, data={"dataset": str(images), "shots": 4, **data}, **FITTED[kind])


@pytest.mark.parametrize("kind", FITTED)
def test_a_run_is_trained_and_evaluated(kind: str, images: Path, tmp_path: Path) -> None:
    result = train_run(settings_of(kind, images, classes="base"), tmp_path / "run", device="cpu")
    assert len(result.history) == FITTED[kind]["train"]["epochs"]
    scores, row = evaluate_run(tmp_path / "run", classes="base", device="cpu")
    assert (scores.images, row["class_names"]) == (4, ["bird", "cat"])
    with pytest.raises(UnlearnedClassesError, match=r"were learned for 2 classes, and 'dog' is not one"):
        evaluate_run(tmp_path / "run", classes="novel", device="cpu")
    stored = read_prompts(tmp_path / "run" / "prompts.safetensors")
    assert stored.info.get("chosen", {}).keys() == CHOSEN.get(kind, {"alpha", "beta"})
    if "tip" in kind:
        assert stored.tensors["keys"].shape[0] == 8
        assert stored.tensors["labels"].tolist().count(0) == 4


@pytest.mark.parametrize("kind", ["tip_adapter-f", "taskres", "clap"])
def test_an_interrupted_run_comes_to_the_same_bytes(kind: str, images: Path, tmp_path: Path) -> None:
    class Interrupting(TrainProgress):
        resumed = 0

        def start(self, epochs: int, steps: int, finished_epochs: int) -> None:
            super().start(epochs, steps, finished_epochs)
            self.resumed = finished_epochs

        def epoch(self, report: EpochReport) -> None:
            if report.epoch == 1 and not self.resumed:
                raise KeyboardInterrupt

    settings, progress = settings_of(kind, images), Interrupting()
    train_run(settings, tmp_path / "straight", device="cpu")
    with pytest.raises(KeyboardInterrupt):
        train_run(settings, tmp_path / "cut", device="cpu", progress=progress)
    train_run(settings, tmp_path / "cut", device="cpu", progress=progress)
    assert progress.resumed == 2
    one, other = (read_prompts(tmp_path / name / "prompts.safetensors") for name in ("straight", "cut"))
    assert one.info == other.info
    assert all(torch.equal(value, other.tensors[name]) for name, value in one.tensors.items())


def test_without_validation_images_the_error_says_what_to_set(make_images: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"this data set has none: set it, as in method\.inverse_reg"):
        train_run(settings_of("linear_probe", make_images()), tmp_path / "run", device="cpu")


@pytest.mark.parametrize("kind", ["linear_probe", "tip_adapter", "tip_adapter-f", "lpplusplus", "gda"])
def test_without_validation_images_no_features_are_extracted(
    kind: str, make_images: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrainingData, "_features", lambda *_: pytest.fail("extracted features for hours"))
    with pytest.raises(ConfigError, match=r"this data set has none: set .*, or give it validation images"):
        train_run(settings_of(kind, make_images()), tmp_path / "run", device="cpu")


def test_settings_are_selected_on_all_validation_images_if_asked(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    fit = TipAdapter.fit_features
    monkeypatch.setattr(TipAdapter, "fit_features", lambda self, f: (seen.append(len(f.val)), fit(self, f))[1])
    for validation, shots in (("few-shot", 1), ("all", 1), ("all", 2)):
        settings = settings_of("tip_adapter", images, shots=shots, validation=validation)
        train_run(settings, images.parent / f"{validation}{shots}", device="cpu")
    assert seen == [4, 8, 8], "four classes of two validation images"
    # What did not ask keeps its name of before there was the choice.
    few, every = (content_name(settings_of("tip_adapter", images, validation=each)) for each in ("few-shot", "all"))
    assert few != every
    assert "validation" not in relevant(settings_of("tip_adapter", images))["data"]


def test_a_sweep_evaluates_only_on_supported_classes(images: Path, tmp_path: Path) -> None:
    sweep = SweepSettings(
        protocol="base-to-novel",
        methods=["linear_probe", "clip_adapter"],
        datasets=[str(images)],
        seeds=[1],
        shots=[4],
        settings={"backbone": {"name": "maple-tiny", "pretrained": "random"}},
    )
    outcomes = run_sweep(plan_sweep(sweep), tmp_path, device="cpu")
    assert [outcome.status for outcome in outcomes] == ["finished", "finished"]
    asked = [[row["asked"]["classes"] for row in outcome.rows] for outcome in outcomes]
    assert asked == [["base"], ["base", "novel"]]
