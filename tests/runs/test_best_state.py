"""`train.keep = "best"`: the state that is best on images that are neither trained nor tested on is the result."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from maple.checkpoint import load_prompts, read_prompts, read_tensors, write_tensors
from maple.cli import app
from maple.clip import Backbone
from maple.config import RunSettings, TrainSettings
from maple.errors import CheckpointError, ConfigError
from maple.evaluation import predict
from maple.methods import build_method
from maple.runs import TrainProgress, read_history, read_settings, train_run, train_together
from maple.runs.frozen_features import prediction_batches
from maple.runs.spec import cached_backbone, open_dataset, relevant, sample, spare_items
from maple.runs.trained_images import TRAINED_IMAGES
from maple.train import EpochReport, Trainer, describe_kept, is_validation_epoch

COOP: dict[str, Any] = {"name": "coop", "prompt_length": 2}


@pytest.fixture
def backbone_of_runs() -> Backbone:
    return cached_backbone("maple-tiny", "random", "fp32", torch.device("cpu"))


@pytest.fixture
def settings_of(make_images: Callable[..., Path]) -> Callable[..., RunSettings]:
    """Settings of a training whose rate is so great that its last state is not the best."""
    images = make_images(train=6, test=1)

    def make(method: dict[str, Any] = COOP, **train: Any) -> RunSettings:
        values = {"epochs": 5, "batch_size": 8, "schedule": "constant", "warmup_epochs": 0, "lr": 0.5, **train}
        return RunSettings(
            backbone={"name": "maple-tiny", "pretrained": "random"},
            data={"dataset": str(images), "shots": 2},
            method=method,
            train={"keep": "best", **values},
        )

    return make


def kept_of(folder: Path) -> dict[str, Any]:
    return dict(read_prompts(folder / "prompts.safetensors").info["kept"])


# --- when, and which


@pytest.mark.parametrize("epochs", [1, 2, 9, 10, 11, 25, 200])
def test_at_most_ten_epochs_are_scored_and_the_last_is_one(epochs: int) -> None:
    scored = [epoch for epoch in range(epochs + 1) if is_validation_epoch(epoch, epochs)]
    assert len(scored) == min(epochs, 10)
    assert (scored[0] > 0, scored[-1]) == (True, epochs)
    gaps = {after - before for before, after in zip([0, *scored], scored, strict=False)}
    assert max(gaps) - min(gaps) <= 1


def test_most_right_then_the_lowest_loss_then_the_later(backbone: Backbone) -> None:
    method = build_method(COOP, backbone, ["cat", "dog"], generator=torch.Generator().manual_seed(1))
    trainer = Trainer(method, TrainSettings(epochs=9))
    (parameter,) = trainer.parameters.values()
    for right, loss, expected in [(5, 0.9, 1), (6, 0.8, 2), (6, 0.85, 2), (6, 0.8, 4), (6, 0.5, 5), (5, 0.1, 5)]:
        trainer.finish_epoch([])
        parameter.data.fill_(trainer.epoch)
        report = trainer.record_validation(right, 8, loss)
        assert report.validation == {"accuracy": right / 8, "loss": loss}
        assert trainer.history[-1] == report == EpochReport.from_json(report.as_json())
        assert trainer.best is not None
        assert trainer.best.epoch == expected
    trainer.load_best()
    assert bool((parameter == 5).all())
    assert trainer.best is not None
    assert trainer.best.compared == 6


# --- runs


def test_the_best_state_is_the_result(
    settings_of: Callable[..., RunSettings], backbone_of_runs: Backbone, tmp_path: Path
) -> None:
    settings = settings_of()
    train_run(settings, tmp_path / "best", device="cpu", backbone=backbone_of_runs)
    kept = kept_of(tmp_path / "best")
    assert kept["epoch"] < kept["epochs"] == kept["compared"] == 5
    assert kept["step"] == kept["epoch"]
    # It is the state of a run of that many epochs: the rate is constant.
    last = settings.changed(train=settings.train.changed(keep="last", epochs=kept["epoch"]))
    train_run(last, tmp_path / "last", device="cpu", backbone=backbone_of_runs)
    prompts = [load_file(tmp_path / name / "prompts.safetensors") for name in ("best", "last")]
    torch.testing.assert_close(*prompts, rtol=0, atol=0)
    # And the best one, on the images that the sample leaves over.
    dataset = open_dataset(settings)
    trained, val, _ = sample(settings, dataset)
    spare = spare_items(settings, dataset, trained, val)
    assert len(spare) == kept["images"] == 4 * 4
    assert not {item.path for item in spare} & {item.path for item in (*trained, *dataset.test)}
    method = load_prompts(tmp_path / "best" / "prompts.safetensors", backbone_of_runs)
    logits, labels = predict(method, prediction_batches(method, spare, dataset.store(), settings))
    assert (logits.argmax(axis=1) == labels).sum() == kept["right"]
    scores = [report.validation for report in read_history(tmp_path / "best")]
    assert kept["right"] / 16 == max(each["accuracy"] for each in scores if each is not None)
    # These images have decided something, as those that were trained on have.
    recognised = (tmp_path / "best" / TRAINED_IMAGES).read_text()
    assert all(item.path in recognised for item in (*spare, *trained))
    # Scoring changes no step.
    whole = settings.changed(train=settings.train.changed(keep="last"))
    train_run(whole, tmp_path / "whole", device="cpu", backbone=backbone_of_runs)
    histories = [[replace(report, validation=None) for report in read_history(tmp_path / n)] for n in ("best", "whole")]
    assert histories[0] == histories[1]
    assert "kept" not in read_prompts(tmp_path / "whole" / "prompts.safetensors").info


class Stop(TrainProgress):
    """Ends a training after an epoch, as an interruption does."""

    def __init__(self, after: int) -> None:
        self.after = after

    def epoch(self, report: EpochReport) -> None:
        if report.epoch + 1 == self.after:
            raise KeyboardInterrupt


@pytest.mark.parametrize("name", ["coop", "promptsrc"])
def test_a_resumed_run_keeps_the_best_state_before_it(
    name: str, settings_of: Callable[..., RunSettings], backbone_of_runs: Backbone, tmp_path: Path
) -> None:
    method = COOP if name == "coop" else {"name": "promptsrc", "text_prompt_depth": 1, "vision_prompt_depth": 1}
    method |= {"teacher_templates": ["a photo of a {}."]} if name == "promptsrc" else {}
    options: dict[str, Any] = {"device": "cpu", "backbone": backbone_of_runs}
    settings = settings_of(method)
    train_run(settings, tmp_path / "straight", **options)
    kept = kept_of(tmp_path / "straight")
    with pytest.raises(KeyboardInterrupt):
        train_run(settings, tmp_path / "resumed", progress=Stop(4), **options)
    tensors, content = read_tensors(tmp_path / "resumed" / "resume.safetensors")
    if name == "coop":
        assert content["trainer"]["best"]["epoch"] == kept["epoch"] == 4
    train_run(settings, tmp_path / "resumed", **options)
    for file in ("prompts.safetensors", "metrics.jsonl"):
        assert (tmp_path / "resumed" / file).read_bytes() == (tmp_path / "straight" / file).read_bytes()
    # A file without a tensor of the best state is damaged.
    (tmp_path / "resumed" / "prompts.safetensors").unlink()
    missing = {key: value for key, value in tensors.items() if not key.startswith("best/prompts/")}
    write_tensors(tmp_path / "resumed" / "resume.safetensors", missing, content)
    with pytest.raises(CheckpointError, match="the best state has other tensors"):
        train_run(settings, tmp_path / "resumed", **options)


def test_features_are_scored_without_images(
    settings_of: Callable[..., RunSettings], backbone_of_runs: Backbone, tmp_path: Path
) -> None:
    settings = settings_of({"name": "taskres"}, views=0, calibrate=True)
    train_run(settings, tmp_path / "run", device="cpu", backbone=backbone_of_runs)
    first = (tmp_path / "run" / "prompts.safetensors").read_bytes()
    assert kept_of(tmp_path / "run")["compared"] == 5
    assert read_prompts(tmp_path / "run" / "prompts.safetensors").info["calibration"]["images"] == 16
    train_run(settings, tmp_path / "again", device="cpu", backbone=backbone_of_runs)  # from the cache of features
    assert (tmp_path / "again" / "prompts.safetensors").read_bytes() == first


def test_runs_that_train_together_keep_their_own_best_states(
    settings_of: Callable[..., RunSettings], backbone_of_runs: Backbone, tmp_path: Path
) -> None:
    runs = [(settings_of().changed(seed=seed), tmp_path / f"together{seed}") for seed in (1, 2)]
    train_together(runs, device="cpu", backbone=backbone_of_runs)
    for settings, folder in runs:
        train_run(settings, tmp_path / f"alone{settings.seed}", device="cpu", backbone=backbone_of_runs)
        alone = kept_of(tmp_path / f"alone{settings.seed}")
        kept = kept_of(folder)
        assert kept.pop("loss") == pytest.approx(alone.pop("loss"), rel=1e-3)
        assert kept == alone


def test_without_images_to_choose_on_it_is_refused(
    settings_of: Callable[..., RunSettings], backbone_of_runs: Backbone, tmp_path: Path
) -> None:
    settings = settings_of()
    settings = settings.changed(data=settings.data.changed(shots=None))
    message = r"train\.keep=best chooses the best state .* and there are none; add validation images"
    with pytest.raises(ConfigError, match=message):
        train_run(settings, tmp_path / "run", device="cpu", backbone=backbone_of_runs)
    assert not (tmp_path / "run" / "config.json").exists()
    # Nothing is chosen where nothing is trained.
    settings = settings.changed(method={"name": "zero_shot"})
    train_run(settings, tmp_path / "zero", device="cpu", backbone=backbone_of_runs)
    assert "kept" not in read_prompts(tmp_path / "zero" / "prompts.safetensors").info


def test_the_last_state_is_the_default_and_its_runs_keep_their_names(settings_of: Callable[..., RunSettings]) -> None:
    assert RunSettings().train.keep == "last"
    settings = settings_of()
    last = settings.changed(train=settings.train.changed(keep="last"))
    assert "keep" not in relevant(last)["train"]
    assert relevant(settings)["train"]["keep"] == "best"


def test_the_command_says_which_state_was_kept(settings_of: Callable[..., RunSettings], tmp_path: Path) -> None:
    data = settings_of().data.dataset
    words = ["train", "--dataset", data, "--shots", 2, "--method", "coop", "--output", tmp_path / "run"]
    words += ["--backbone", "maple-tiny", "--pretrained", "random", "--device", "cpu"]
    for setting in ("keep=best", "epochs=3", "lr=0.5", "warmup_epochs=0", "batch_size=8"):
        words += ["--set", f"train.{setting}"]
    done = CliRunner().invoke(app, list(map(str, words)), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    sentence = describe_kept(kept_of(tmp_path / "run"))
    assert sentence.startswith("The state after epoch ")
    assert sentence in done.stdout
    assert done.stderr.count("validation acc ") == 3
    assert sentence in CliRunner().invoke(app, ["inspect", str(tmp_path / "run")]).stdout
    assert read_settings(tmp_path / "run").train.keep == "best"
