"""Sweeps whose runs train together: the same rows as alone, and runs that cannot train together."""

import json
import logging
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import forking_context
from sweep_tools import RecordedProgress, rows_below, small_sweep
from typer.testing import CliRunner

from maple.cli import app
from maple.errors import ConfigError
from maple.methods import METHODS
from maple.plugins import trust_code
from maple.runs.folder import lock_folder
from maple.sweeps import PlannedRun, RunOutcome, executors, in_processes, run_sweep, runner
from maple.sweeps.executors import ATTEMPTS
from maple.sweeps.runner import run_group

Group = tuple[PlannedRun, ...]


@pytest.fixture
def forked_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start workers as forks: new interpreters, which `test_killed_sweeps_end_in_the_same_rows` has, take seconds."""
    monkeypatch.setattr(executors.multiprocessing, "get_context", lambda _: forking_context())


def runs_of(images: Path, seeds: int = 3, **grid: list[Any]) -> list[PlannedRun]:
    layer = {"vision_prompt_depth": [2], **grid}
    return small_sweep(images, methods=["vpt"], seeds=list(range(1, seeds + 1)), grid=layer)


def test_rows_are_the_same_as_one_by_one(make_images: Callable[..., Path], tmp_path: Path) -> None:
    images = make_images(train=2)
    runs = runs_of(images, **{"train.lr": [0.01, 0.02]}) + runs_of(images, 1, **{"train.epochs": [1]})
    sizes: list[int] = []

    def work(group: Group, *arguments: Any) -> list[RunOutcome]:
        sizes.append(len(group))
        return run_group(group, *arguments)

    progress = RecordedProgress()
    alone = run_sweep(runs, tmp_path / "alone", device="cpu", progress=RecordedProgress())
    grouped = run_sweep(runs, tmp_path / "grouped", device="cpu", together=4, work=work, progress=progress)
    assert sizes == [4, 2, 1], "six alike, and one of other epochs"
    assert [outcome.name for outcome in grouped] == [run.name for run in runs]
    assert [outcome.status for outcome in grouped] == ["finished"] * 7
    assert all(outcome.seconds > 0 for outcome in grouped)
    assert rows_below(tmp_path / "grouped") == rows_below(tmp_path / "alone")
    assert [len(outcome.rows) for outcome in grouped] == [len(outcome.rows) for outcome in alone]
    assert {name for name, activity in progress.activities if activity.startswith("epoch")} == {
        run.name for run in runs
    }
    kept = run_sweep(runs, tmp_path / "grouped", device="cpu", together=4, work=work, progress=RecordedProgress())
    assert sizes == [4, 2, 1]
    assert [outcome.rows for outcome in kept] == [outcome.rows for outcome in grouped]


def test_a_failed_and_a_busy_run(make_images: Callable[..., Path], tmp_path: Path) -> None:
    runs = runs_of(make_images(train=2), 2, **{"train.lr": [0.01, 1e30], "train.epochs": [3]})
    good, diverging, busy, other = (runs[number] for number in (0, 1, 2, 3))
    assert [run.settings.train.lr for run in (good, diverging)] == [0.01, 1e30]
    with lock_folder(tmp_path / busy.name):
        outcomes = run_sweep(runs, tmp_path, device="cpu", together=4, progress=RecordedProgress())
    by_name = {outcome.name: outcome for outcome in outcomes}
    assert [by_name[run.name].status for run in (good, diverging, busy, other)] == [
        "finished",
        "failed",
        "busy",
        "failed",
    ]
    recorded = json.loads((tmp_path / diverging.name / "failure.json").read_text())
    assert "training diverged" in recorded["error"]
    assert recorded["error"] == by_name[diverging.name].error
    assert not (tmp_path / busy.name / "failure.json").exists()
    assert not (tmp_path / good.name / "failure.json").exists()


def test_runs_that_cannot_share_a_pass_continue_one_by_one(
    make_images: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def no_room(*_: Any, **__: Any) -> None:
        raise MemoryError("no room for three")

    monkeypatch.setattr(runner, "train_together", no_room)
    with caplog.at_level(logging.WARNING):
        outcomes = run_sweep(runs_of(make_images()), tmp_path, device="cpu", together=3, progress=RecordedProgress())
    assert [outcome.status for outcome in outcomes] == ["finished"] * 3
    assert "3 runs continue one by one: they cannot be trained together: no room for three" in caplog.text


def dies_unless_alone(group: Group, *_: Any) -> list[RunOutcome]:
    if len(group) > 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return [RunOutcome(group[0].name, "finished")]


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
@pytest.mark.usefixtures("forked_workers")
def test_a_group_whose_process_dies_continues_run_by_run(make_images: Callable[..., Path], tmp_path: Path) -> None:
    first, second, third = runs_of(make_images())
    ends = list(in_processes([(first, second), (third,)], tmp_path, dies_unless_alone, lambda *_: None, jobs=1))
    assert {run.name for run, _ in ends} == {first.name, second.name, third.name}
    assert [outcome.status for _, outcome in ends] == ["finished"] * 3


def dies_if_first(group: Group, root: Path, *_: Any) -> list[RunOutcome]:
    """The first run ends its process at each start; the others work until it was started often enough to fail alone."""
    (run,) = group
    starts = root / "starts"
    if run.settings.seed == 1:
        with starts.open("a") as file:
            file.write("x")
        os.kill(os.getpid(), signal.SIGKILL)
    # Not for ever: Python's pool may notice a death only when another process of it ends.
    for _ in range(1000):
        if starts.exists() and len(starts.read_text()) > ATTEMPTS:
            break
        time.sleep(0.02)
    return [RunOutcome(run.name, "finished")]


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
@pytest.mark.usefixtures("forked_workers")
def test_a_run_whose_process_dies_fails_alone(make_images: Callable[..., Path], tmp_path: Path) -> None:
    runs = runs_of(make_images() / "train")  # undivided: a run for each seed
    ends = list(in_processes([(run,) for run in runs], tmp_path, dies_if_first, lambda *_: None, jobs=2))
    statuses = {run.settings.seed: outcome.status for run, outcome in ends}
    assert statuses == {1: "failed", 2: "finished", 3: "finished"}
    assert [path.parent.name for path in tmp_path.glob("*/failure.json")] == [runs[0].name]
    assert len((tmp_path / "starts").read_text()) == 1 + ATTEMPTS, "once beside others, the rest alone"


def says_what_it_has(group: Group, *_: Any) -> list[RunOutcome]:
    """Reports the title of the run's method and the number of threads, as its error."""
    (run,) = group
    title = METHODS.find(run.settings.method["name"]).title
    return [RunOutcome(run.name, "failed", error=f"{title}, {torch.get_num_threads()} threads")]


METHOD = """
from maple.methods import METHODS

class Renamed(METHODS["coop"]):
    title = "renamed"
"""


@pytest.mark.usefixtures("forked_workers")
def test_processes_get_code_and_their_share_of_the_usable_cores(
    make_images: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))  # where no state can be kept
    monkeypatch.setattr("maple.plugins._accepted", {})
    monkeypatch.setattr("maple.config.toml._added", {})
    monkeypatch.setattr(METHODS, "_known", dict(METHODS._known))
    (tmp_path / "renamed.py").write_text(METHOD)
    name = trust_code(f"{tmp_path / 'renamed.py'}:Renamed")
    runs = small_sweep(make_images(), methods=[name])
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(6)), raising=False)
    monkeypatch.setattr("torch.get_num_threads", lambda: 3)

    def outcome_of(jobs: int) -> str | None:
        ((_, outcome),) = in_processes([(runs[0],)], tmp_path, says_what_it_has, lambda *_: None, jobs=jobs)
        return outcome.error

    assert outcome_of(3) == "renamed, 2 threads"
    assert outcome_of(1) == "renamed, 3 threads", "no more than PyTorch may use"


def test_impossible_values_are_refused(make_images: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="together is 0; it must be at least 1"):
        run_sweep(runs_of(make_images(), 1), tmp_path, together=0, progress=RecordedProgress())
    refused = CliRunner().invoke(app, ["sweep", "demo", "--together", "0"])
    assert refused.exit_code == 2
    assert "--together" in refused.output
