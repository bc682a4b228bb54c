"""Sweeps whose runs train together: the same rows, and what becomes of those that cannot."""

import json
import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sweep_tools import Watcher, rows_below, small_sweep
from typer.testing import CliRunner

from maple.cli import app
from maple.errors import ConfigError
from maple.runs import only_one
from maple.sweeps import Outcome, PlannedRun, in_processes, run_group, run_sweep
from maple.sweeps import runner as running

Group = tuple[PlannedRun, ...]


def runs_of(images: Path, seeds: int = 3, **grid: list[Any]) -> list[PlannedRun]:
    layer = {"vision_prompt_depth": [2], **grid}
    return small_sweep(images, methods=["vpt"], seeds=list(range(1, seeds + 1)), grid=layer)


def test_the_rows_are_those_of_one_by_one(make_images: Callable[..., Path], tmp_path: Path) -> None:
    images = make_images(train=2)
    runs = runs_of(images, **{"train.lr": [0.01, 0.02]}) + runs_of(images, 1, **{"train.epochs": [1]})
    sizes: list[int] = []

    def work(group: Group, *given: Any) -> list[Outcome]:
        sizes.append(len(group))
        return run_group(group, *given)

    watcher = Watcher()
    alone = run_sweep(runs, tmp_path / "alone", device="cpu", progress=Watcher())
    beside = run_sweep(runs, tmp_path / "beside", device="cpu", together=4, work=work, progress=watcher)
    assert sizes == [4, 2, 1], "six alike, and one of other epochs"
    assert [outcome.name for outcome in beside] == [run.name for run in runs]
    assert [outcome.status for outcome in beside] == ["finished"] * 7
    assert all(outcome.seconds > 0 for outcome in beside)
    assert rows_below(tmp_path / "beside") == rows_below(tmp_path / "alone")
    assert [len(outcome.rows) for outcome in beside] == [len(outcome.rows) for outcome in alone]
    assert {name for name, what in watcher.told if what.startswith("epoch")} == {run.name for run in runs}
    kept = run_sweep(runs, tmp_path / "beside", device="cpu", together=4, work=work, progress=Watcher())
    assert sizes == [4, 2, 1]
    assert [outcome.rows for outcome in kept] == [outcome.rows for outcome in beside]


def test_one_that_fails_and_one_that_is_busy(make_images: Callable[..., Path], tmp_path: Path) -> None:
    runs = runs_of(make_images(train=2), 2, **{"train.lr": [0.01, 1e30], "train.epochs": [3]})
    good, diverging, busy, other = (runs[number] for number in (0, 1, 2, 3))
    assert [run.settings.train.lr for run in (good, diverging)] == [0.01, 1e30]
    with only_one(tmp_path / busy.name):
        outcomes = run_sweep(runs, tmp_path, device="cpu", together=4, progress=Watcher())
    told = {outcome.name: outcome for outcome in outcomes}
    assert [told[run.name].status for run in (good, diverging, busy, other)] == ["finished", "failed", "busy", "failed"]
    recorded = json.loads((tmp_path / diverging.name / "failure.json").read_text())
    assert "training diverged" in recorded["error"]
    assert recorded["error"] == told[diverging.name].error
    assert not (tmp_path / busy.name / "failure.json").exists()
    assert not (tmp_path / good.name / "failure.json").exists()


def test_if_they_cannot_share_they_go_on_one_by_one(
    make_images: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def no_room(*_: Any, **__: Any) -> None:
        raise MemoryError("no room for three")

    monkeypatch.setattr(running, "train_together", no_room)
    with caplog.at_level(logging.WARNING):
        outcomes = run_sweep(runs_of(make_images()), tmp_path, device="cpu", together=3, progress=Watcher())
    assert [outcome.status for outcome in outcomes] == ["finished"] * 3
    assert "3 runs go on one by one, since together: no room for three" in caplog.text


def dies_unless_alone(group: Group, *_: Any) -> list[Outcome]:
    if len(group) > 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return [Outcome(group[0].name, "finished")]


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_a_group_whose_process_dies_goes_on_run_by_run(make_images: Callable[..., Path], tmp_path: Path) -> None:
    first, second, third = runs_of(make_images())
    ends = list(in_processes([(first, second), (third,)], tmp_path, dies_unless_alone, lambda *_: None, jobs=1))
    assert {run.name for run, _ in ends} == {first.name, second.name, third.name}
    assert [outcome.status for _, outcome in ends] == ["finished"] * 3


def test_what_is_refused(make_images: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="together is 0; it must be at least 1"):
        run_sweep(runs_of(make_images(), 1), tmp_path, together=0, progress=Watcher())
    refused = CliRunner().invoke(app, ["sweep", "demo", "--together", "0"])
    assert refused.exit_code == 2
    assert "--together" in refused.output
