"""Trackers: TensorBoard as it is, Weights & Biases and MLflow through stand-ins of their packages."""

import json
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from maple.config import RunSettings
from maple.errors import ConfigError
from maple.runs import Tracked, TrainProgress, evaluate_run, read_history, train_run
from maple.train import StepReport

Make = Callable[..., RunSettings]


def train_tracked(name: str, folder: Path, settings: RunSettings) -> None:
    with Tracked(name, folder, settings, TrainProgress()) as tracked:
        train_run(settings, folder, device="cpu", progress=tracked)
        _, row = evaluate_run(folder, device="cpu")
        tracked.row(row)


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {tag: [(one.step, one.value) for one in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard(make_images: Callable[..., Path], settings_for: Make, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="pip install 'maple-clip[tensorboard]'")
    settings, folder = settings_for(make_images()), tmp_path / "run"
    train_tracked("tensorboard", folder, settings)
    found = scalars(folder)
    history = read_history(folder)
    losses = [loss for epoch in history for loss in epoch.losses]
    assert [step for step, _ in found["step/loss"]] == list(range(len(losses)))
    assert [value for _, value in found["step/loss"]] == pytest.approx(losses, rel=1e-6)
    assert [value for _, value in found["epoch/loss"]] == pytest.approx([epoch.loss for epoch in history], rel=1e-6)
    assert [value for _, value in found["step/lr"]][-1] == pytest.approx(history[-1].lr, rel=1e-6)
    row = json.loads((folder / "rows.jsonl").read_text())
    assert found["pictures all/top1"][0][1] == pytest.approx(row["top1"])


class Stop(TrainProgress):
    """Interrupts in the first step of the second epoch."""

    def step(self, report: Any) -> None:
        if report.epoch == 1:
            raise KeyboardInterrupt


def test_a_resumed_run_goes_on_in_its_place(
    make_images: Callable[..., Path], settings_for: Make, tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard", reason="pip install 'maple-clip[tensorboard]'")
    settings, folder = settings_for(make_images()), tmp_path / "run"
    with pytest.raises(KeyboardInterrupt), Tracked("tensorboard", folder, settings, Stop()) as tracked:
        train_run(settings, folder, device="cpu", progress=tracked)
    train_tracked("tensorboard", folder, settings)
    steps = [step for step, _ in scalars(folder)["step/loss"]]
    assert steps == list(range(len(steps))), "what was told of the broken epoch is told once"
    assert sum(len(epoch.losses) for epoch in read_history(folder)) == len(steps)


def test_an_evaluation_of_a_finished_run_keeps_its_history(
    make_images: Callable[..., Path], settings_for: Make, tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard", reason="pip install 'maple-clip[tensorboard]'")
    settings, folder = settings_for(make_images()), tmp_path / "run"
    train_tracked("tensorboard", folder, settings)
    trained = scalars(folder)["step/loss"]
    train_tracked("tensorboard", folder, settings)
    found = scalars(folder)
    assert found["step/loss"] == trained
    assert found["pictures all/top1"][-1][0] == len(trained)


class Recorder:
    """Keeps every call."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def named(self, name: str, *names: str) -> list[Any]:
        return [values for called, values in self.calls if called in (name, *names)]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Recorder]:
    """Put a module of that name in place, whose functions only record."""

    def make(name: str, **contents: Any) -> Recorder:
        recorder, module = Recorder(), ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        for key, value in contents.items():
            setattr(module, key, value(recorder) if callable(value) else value)
        monkeypatch.setitem(sys.modules, name, module)
        return recorder

    return make


def recording(name: str, answer: Any = None) -> Callable[[Recorder], Callable[..., Any]]:
    def bind(recorder: Recorder) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            recorder.calls.append((name, (given, named)))
            return answer(recorder) if callable(answer) else answer

        return call

    return bind


def test_weights_and_biases(
    stand_in: Callable[..., Recorder], make_images: Callable[..., Path], settings_for: Make, tmp_path: Path
) -> None:
    def run(recorder: Recorder) -> SimpleNamespace:
        return SimpleNamespace(log=recording("log")(recorder), finish=recording("finish")(recorder))

    configured = lambda recorder: SimpleNamespace(update=recording("config")(recorder))  # noqa: E731
    recorder = stand_in("wandb", init=recording("init", run), config=configured)
    settings, folder = settings_for(make_images()), tmp_path / "run"
    train_tracked("wandb", folder, settings)
    ((_, opened),) = recorder.named("init")
    assert (opened["project"], opened["name"], opened["resume"]) == ("maple", "run", "allow")
    assert json.loads((folder / "wandb.json").read_text()) == {"run_id": opened["id"]}
    ((config, _),) = recorder.named("config")
    assert (config[0]["train.epochs"], config[0]["method.name"]) == (2, "maple")
    told = [values[0] for values, _ in recorder.named("log")]
    losses = [loss for epoch in read_history(folder) for loss in epoch.losses]
    assert [values["step/loss"] for values in told if "step/loss" in values] == losses
    assert "pictures all/top1" in told[-1]
    assert len(recorder.named("finish")) == 1
    row = json.loads((folder / "rows.jsonl").read_text())
    for place in (folder, tmp_path / "elsewhere" / "run"):
        with Tracked("wandb", place, settings, TrainProgress()) as tracked:
            tracked.row(row)
    again, other = (opened["id"] for _, opened in recorder.named("init")[1:])
    assert again == opened["id"]
    assert other != opened["id"], "a run in another folder of the same name"


class StoppedError(Exception):
    """The tracker's server is gone."""


def test_a_tracker_that_fails_does_not_end_the_run(
    stand_in: Callable[..., Recorder],
    make_images: Callable[..., Path],
    settings_for: Make,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(_: Recorder) -> None:
        raise StoppedError("the disk of the server is full")

    def run(recorder: Recorder) -> SimpleNamespace:
        return SimpleNamespace(log=recording("log", fail)(recorder), finish=recording("finish", fail)(recorder))

    configured = lambda recorder: SimpleNamespace(update=recording("config")(recorder))  # noqa: E731
    recorder = stand_in("wandb", init=recording("init", run), config=configured)
    settings, folder = settings_for(make_images()), tmp_path / "run"
    train_tracked("wandb", folder, settings)
    assert (folder / "rows.jsonl").is_file()
    assert len(recorder.named("log")) == len(recorder.named("finish")) == 1
    assert caplog.text.count("wandb fails (StoppedError: the disk of the server is full); the run continues") == 1


def test_only_the_main_process_logs(
    stand_in: Callable[..., Recorder], settings_for: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = stand_in("wandb", init=recording("init"))
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    with Tracked("wandb", tmp_path, settings_for(tmp_path)) as tracked:
        tracked.start(1, 1, 0)
        tracked.step(StepReport(0, 0, 1, 0.1, 0.5, {}))
    assert recorder.calls == []


def test_mlflow_goes_on_with_its_run(
    stand_in: Callable[..., Recorder], make_images: Callable[..., Path], settings_for: Make, tmp_path: Path
) -> None:
    limits = SimpleNamespace(validation=SimpleNamespace(MAX_PARAM_VAL_LENGTH=500, MAX_PARAMS_TAGS_PER_BATCH=100))
    started = SimpleNamespace(info=SimpleNamespace(run_id="r17"))
    recorder = stand_in(
        "mlflow",
        utils=limits,
        search_experiments=recording("search", lambda _: []),
        create_experiment=recording("create", "e1"),
        start_run=recording("start", lambda _: started),
        log_params=recording("params"),
        log_metrics=recording("metrics"),
        end_run=recording("end"),
    )
    settings, folder = settings_for(make_images()), tmp_path / "run"
    train_tracked("mlflow", folder, settings)
    assert recorder.named("create")[0][1]["name"] == "maple"
    assert (recorder.named("start")[0][1]["run_id"], recorder.named("start")[0][1]["run_name"]) == (None, "run")
    assert any("step/loss" in values[0] for values, _ in recorder.named("metrics"))
    assert json.loads((folder / "mlflow.json").read_text()) == {"run_id": "r17"}
    with Tracked("mlflow", folder, settings, TrainProgress()) as tracked:
        tracked.row(json.loads((folder / "rows.jsonl").read_text()))
    assert recorder.named("start")[1][1]["run_id"] == "r17"
    assert len(recorder.named("params")) == 1, "it refuses settings that differ from those of its run"
    assert len(recorder.named("end")) == 2


def test_what_is_not_there_is_refused(
    stand_in: Callable[..., Recorder], settings_for: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_for(tmp_path)
    with pytest.raises(ConfigError, match="unknown tracker 'comet'; choose one of: tensorboard, wandb, mlflow"):
        Tracked("comet", tmp_path, settings, TrainProgress())
    monkeypatch.setattr("maple.runs.tracking.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"the tracker wandb needs its package: pip install 'maple-clip\[wandb\]'"):
        Tracked("wandb", tmp_path, settings, TrainProgress())
    monkeypatch.undo()

    def no_key(_: Recorder) -> None:
        raise RuntimeError("api_key not configured")

    stand_in("wandb", init=recording("init", no_key))
    with (
        pytest.raises(ConfigError, match="wandb cannot start: RuntimeError: api_key not configured"),
        Tracked("wandb", tmp_path, settings, TrainProgress()) as tracked,
    ):
        tracked.start(1, 1, 0)


def test_nothing_is_begun_for_a_run_that_has_finished(
    make_images: Callable[..., Path], settings_for: Make, tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard", reason="pip install 'maple-clip[tensorboard]'")
    settings, folder = settings_for(make_images(), epochs=1), tmp_path / "run"
    train_run(settings, folder, device="cpu")
    with Tracked("tensorboard", folder, settings, TrainProgress()) as tracked:
        assert train_run(settings, folder, device="cpu", progress=tracked).was_finished
    assert not (folder / "tensorboard").exists()
