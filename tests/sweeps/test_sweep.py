"""Executed sweeps: runs that are kept, resumed, failed, retried and killed."""

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from forked import ForkedProcess, run_maple, start_maple
from sweep_tools import SMALL, RecordedProgress, rows_below, small_sweep
from typer.testing import CliRunner

from maple.cli import app
from maple.data.catalogue import draw_published_split
from maple.errors import ConfigError
from maple.runs import train_run
from maple.runs.folder import lock_folder
from maple.sweeps import RunOutcome, SweepSettings, plan_sweep, run_sweep
from maple.sweeps.executors import in_turn
from maple.sweeps.runner import record_failure, run_group, status_of


def test_finished_runs_are_kept(make_images: Callable[..., Path], tmp_path: Path) -> None:
    runs = small_sweep(make_images(), settings={**SMALL, "method": {}, "data": {}}, methods=["zero_shot"])
    first, again = RecordedProgress(), RecordedProgress()
    assert status_of(runs[0], tmp_path / "runs") == "new"
    (outcome,) = run_sweep(runs, tmp_path / "runs", device="cpu", progress=first)
    assert (outcome.status, first.ends) == ("finished", ["finished"])
    assert [row["asked"]["classes"] for row in outcome.rows] == ["base", "novel"]
    assert [row["images"] for row in outcome.rows] == [6, 6]
    (kept,) = run_sweep(runs, tmp_path / "runs", device="cpu", progress=again)
    assert (kept.rows, kept.seconds, again.activities) == (outcome.rows, 0.0, [])


def test_a_drawn_split_that_has_been_replaced_is_said(
    make_images_in: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where runs have finished with a split drawn at random, and the published one is there now."""
    make_images_in(tmp_path / "dtd", "all", ("banded", "blotchy"), train=8)
    (tmp_path / "dtd" / "all" / "train").rename(tmp_path / "dtd" / "images")
    drawn = draw_published_split("dtd", tmp_path, 1)
    settings = {**SMALL, "data": {"root": str(tmp_path)}}
    options = {"protocol": "few-shot", "methods": ["zero_shot"], "datasets": ["dtd"], "shots": [1]}
    (run,) = plan_sweep(SweepSettings(**options, settings=settings, seeds=[1]))
    (outcome,) = run_sweep([run], tmp_path / "runs", device="cpu")
    assert [row["dataset"] for row in outcome.rows] == ["dtd (drawn split)"]

    def repeat() -> str:
        caplog.clear()
        assert run_sweep([run], tmp_path / "runs", device="cpu")[0].status == "finished"
        assert train_run(run.settings, tmp_path / "runs" / run.name).was_finished
        return caplog.text

    assert "published split is there now" not in repeat()
    splits = {part: json.loads(drawn.read_text())[part] for part in ("train", "val", "test")}
    (drawn.parent / "split_zhou_DescribableTextures.json").write_text(json.dumps(splits))
    assert repeat().count("has finished, with the dtd (drawn split); the published split is there now") == 2


def test_a_target_with_other_images_than_before_is_evaluated_again(
    make_images_in: Callable[..., Path], tmp_path: Path
) -> None:
    """ImageNet-R is whatever its folders hold: an evaluation of a part of it must not stay."""
    make_images_in(tmp_path / "dtd", "all", ("banded", "blotchy"), train=8)
    (tmp_path / "dtd" / "all" / "train").rename(tmp_path / "dtd" / "images")
    draw_published_split("dtd", tmp_path, 1)
    target = tmp_path / "imagenet-rendition"
    make_images_in(target, "imagenet-r", ("n01440764", "n01443537"), train=0)
    for synset in ("n01440764", "n01443537"):
        (target / "imagenet-r" / "test" / synset).rename(target / "imagenet-r" / synset)
    shutil.rmtree(target / "imagenet-r" / "test")
    shutil.rmtree(target / "imagenet-r" / "train")
    (target / "classnames.txt").write_text("n01440764 tench\nn01443537 goldfish\n")
    settings = {**SMALL, "data": {"root": str(tmp_path)}}
    options = {"protocol": "cross-dataset", "methods": ["zero_shot"], "source": "dtd", "datasets": ["imagenet_r"]}
    runs = plan_sweep(SweepSettings(**options, settings=settings, seeds=[1]))

    def images() -> int:
        (outcome,) = run_sweep(runs, tmp_path / "runs", device="cpu")
        assert outcome.error is None
        return int(outcome.rows[-1]["images"])

    assert images() == 6
    (target / "imagenet-r" / "n01440764" / "2.png").unlink()
    assert images() == 5
    target.rename(tmp_path / "elsewhere")
    assert images() == 5, "what is not there now stays as it was"


def test_a_tracker_logs_training_and_evaluations(make_images: Callable[..., Path], tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    runs = small_sweep(make_images(), methods=["vpt"], grid={"vision_prompt_depth": [2]})
    work = partial(run_group, tracker="tensorboard")
    (outcome,) = run_sweep(runs, tmp_path, device="cpu", work=work, progress=RecordedProgress())
    events = accumulator.EventAccumulator(str(tmp_path / runs[0].name / "tensorboard"))
    events.Reload()
    logged = [events.Scalars(f"pictures {part}/top1")[0].value for part in ("base", "novel")]
    assert logged == pytest.approx([row["top1"] for row in outcome.rows])
    assert len(events.Scalars("epoch/loss")) == 2


def test_a_lost_evaluation_is_repeated_without_training(make_images: Callable[..., Path], tmp_path: Path) -> None:
    runs = small_sweep(make_images(), methods=["vpt"], grid={"vision_prompt_depth": [2]})
    (outcome,) = run_sweep(runs, tmp_path, device="cpu", progress=RecordedProgress())
    rows = tmp_path / runs[0].name / "rows.jsonl"
    rows.write_text(rows.read_text().splitlines()[0] + "\n")
    assert status_of(runs[0], tmp_path) == "interrupted"
    progress = RecordedProgress()
    (again,) = run_sweep(runs, tmp_path, device="cpu", progress=progress)
    assert [row["top1"] for row in again.rows] == [row["top1"] for row in outcome.rows]
    assert {activity for _, activity in progress.activities} == {"evaluating (novel)"}


def test_damaged_rows_affect_their_own_run_only(make_images: Callable[..., Path], tmp_path: Path) -> None:
    runs = small_sweep(make_images() / "train", methods=["zero_shot"], seeds=[1, 2])  # undivided: a run for each seed
    first = run_sweep(runs, tmp_path, device="cpu", progress=RecordedProgress())
    rows = tmp_path / runs[0].name / "rows.jsonl"
    whole = rows.read_text()
    rows.write_text(whole + '{"top1": ')
    assert [status_of(run, tmp_path) for run in runs] == ["interrupted", "finished"]
    again = run_sweep(runs, tmp_path, device="cpu", progress=RecordedProgress())
    assert [outcome.status for outcome in again] == ["failed", "finished"]
    assert "rows.jsonl" in str(again[0].error)
    assert "move it away" in str(again[0].error)
    rows.unlink()
    retried = run_sweep(runs, tmp_path, device="cpu", retry_failed=True, progress=RecordedProgress())
    assert [row["top1"] for row in retried[0].rows] == [row["top1"] for row in first[0].rows]


def test_an_unwritable_folder_is_refused_at_once(make_images: Callable[..., Path], tmp_path: Path) -> None:
    runs = small_sweep(make_images(), methods=["zero_shot"])
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file", tmp_path / "file" / "runs", Path("/proc/runs")):
        progress = RecordedProgress()
        with pytest.raises(ConfigError, match=r"cannot be written to .*; choose another output"):
            run_sweep(runs, root, device="cpu", progress=progress)
        assert not progress.activities


def test_a_failure_that_cannot_be_recorded_stops_nothing(
    make_images: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    runs = small_sweep(make_images(), grid={})  # VPT's recipe prompts 12 layers; this CLIP has 4
    (tmp_path / runs[1].name).write_text("in the way")
    zero_shot, vpt = run_sweep(runs, tmp_path, device="cpu", progress=RecordedProgress())
    assert (zero_shot.status, vpt.status) == ("finished", "failed")
    assert "failure.json cannot be written" in caplog.text


def test_a_failure_is_recorded_and_the_other_runs_continue(make_images: Callable[..., Path], tmp_path: Path) -> None:
    runs = small_sweep(make_images(), grid={})  # VPT's recipe prompts 12 layers; this CLIP has 4
    zero_shot, vpt = run_sweep(runs, tmp_path, device="cpu", progress=RecordedProgress())
    assert (zero_shot.status, vpt.status) == ("finished", "failed")
    assert "the image tower has 4 blocks" in str(vpt.error)
    assert status_of(runs[1], tmp_path) == "failed"
    progress = RecordedProgress()
    again = run_sweep(runs, tmp_path, device="cpu", progress=progress)
    assert (again[1].status, again[1].error, progress.activities) == ("failed", vpt.error, [])
    (tmp_path / runs[1].name / "failure.json").write_text("{")
    assert "unreadable" in str(run_sweep(runs, tmp_path, device="cpu", progress=RecordedProgress())[1].error)
    retried = run_sweep(runs, tmp_path, device="cpu", retry_failed=True, progress=RecordedProgress())
    assert retried[1].error == vpt.error


@pytest.mark.parametrize("retry_failed", [False, True])
def test_a_failure_of_another_sweep_is_not_repeated(
    retry_failed: bool, make_images: Callable[..., Path], tmp_path: Path
) -> None:
    """Two sweeps of one plan, as in an array of SLURM: the second fails a run after the first has begun."""
    runs = small_sweep(make_images(), grid={})  # VPT's recipe prompts 12 layers; this CLIP has 4

    def after_another(*arguments: Any) -> Any:
        run_sweep(runs, tmp_path, device="cpu", progress=RecordedProgress())
        (tmp_path / runs[1].name / "failure.json").write_text('{"error": "of the other sweep"}')
        return in_turn(*arguments, device="cpu")

    first = run_sweep(runs, tmp_path, executor=after_another, retry_failed=retry_failed, progress=RecordedProgress())
    assert [outcome.status for outcome in first] == ["finished", "failed"]
    assert (first[1].error == "of the other sweep") is not retry_failed


def test_a_failure_that_another_sweep_records_before_the_lock_is_free(
    make_images: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run,) = small_sweep(make_images(), methods=["zero_shot"])

    def late(*arguments: Any, **options: Any) -> Any:
        record_failure(run, tmp_path, "of the other sweep")
        return train_run(*arguments, **options)

    monkeypatch.setattr("maple.sweeps.runner.train_run", late)
    (outcome,) = run_sweep([run], tmp_path, device="cpu", progress=RecordedProgress())
    assert (outcome.status, outcome.error) == ("failed", "of the other sweep")
    (outcome,) = run_sweep([run], tmp_path, device="cpu", retry_failed=True, progress=RecordedProgress())
    assert outcome.status == "finished"


def test_a_run_of_another_process_is_busy(make_images: Callable[..., Path], tmp_path: Path) -> None:
    runs = small_sweep(make_images(), methods=["zero_shot"])
    with lock_folder(tmp_path / runs[0].name):
        (outcome,) = run_sweep(runs, tmp_path, device="cpu", progress=RecordedProgress())
    assert outcome.status == "busy"
    assert not (tmp_path / runs[0].name / "failure.json").exists()
    assert run_sweep(runs, tmp_path, device="cpu", progress=RecordedProgress())[0].status == "finished"


def sleep(_group: object, root: Path, *_: object) -> list[RunOutcome]:
    (root / f"worker{os.getpid()}").touch()
    time.sleep(200)
    return []


def sleeping_sweep(root: Path) -> None:
    settings = SweepSettings(protocol="few-shot", methods=["coop"], datasets=["emoji-animals"], shots=[1, 2])
    run_sweep(plan_sweep(settings), root, jobs=2, device="cpu", work=sleep)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs signals")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_the_sweep(number: signal.Signals, tmp_path: Path) -> None:
    sweep, limit = ForkedProcess(sleeping_sweep, tmp_path), time.monotonic() + 150
    while len(workers := list(tmp_path.glob("worker*"))) < 2 and time.monotonic() < limit:
        time.sleep(0.05)
    assert len(workers) == 2, sweep.stderr
    sweep.send_signal(number)  # to the parent alone
    assert sweep.wait(30) != 0
    numbers, limit = {path.name.removeprefix("worker") for path in workers}, time.monotonic() + 20
    while (left := numbers & working()) and time.monotonic() < limit:
        time.sleep(0.05)
    assert not left


def working() -> set[str]:
    """The ids of all processes that have not ended."""
    return {str(each.pid) for each in psutil.process_iter(["status"]) if each.info["status"] != psutil.STATUS_ZOMBIE}


COMMAND = [
    *("sweep", "base-to-novel", "--methods", "vpt", "--seeds", "1,2", "--shots", "all"),
    *("--set", "method.vision_prompt_depth=2", "--set", "train.epochs=3", "--backbone", "maple-tiny"),
    *("--pretrained", "random", "--device", "cpu"),
]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["base-to-novel", "--methods", "vpt"], "base-to-novel names no datasets; give --datasets"),
        (["ablation-depth"], "ablation-depth names no datasets"),
        (["demo", "--executor", "cloud"], "unknown executor 'cloud'; choose one of: local, ray"),
        (["demo", "--gpus-per-run", "0.5"], "--gpus-per-run without --executor ray has no effect"),
        (["demo", "--ray-address", "auto"], "--ray-address without --executor ray"),
        (["demo", "--executor", "ray", "--jobs", "2"], "--jobs 2 is for --executor local"),
        (["demo", "--jobs", "0"], "jobs is 0; it must be at least 1"),
        (["demo", "--tracker", "comet"], "unknown tracker 'comet'"),
    ],
)
def test_impossible_commands_are_refused(options: list[str], message: str, tmp_path: Path) -> None:
    refused = CliRunner().invoke(app, ["sweep", *options, "--output", str(tmp_path / "runs")])
    assert isinstance(refused.exception, ConfigError), refused.output
    assert message in str(refused.exception)
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_killed_sweeps_end_in_the_same_rows(make_images: Callable[..., Path], tmp_path: Path) -> None:
    """All processes of a sweep are killed, first while a run begins, then after an epoch."""
    # Enough epochs that runs are still in progress when a busy machine notices that one has begun.
    command = [*COMMAND, "--set", "train.epochs=12", "--datasets", make_images()]
    straight = run_maple(*command, "--output", tmp_path / "straight")
    assert straight.returncode == 0, straight.stderr
    command += ["--output", tmp_path / "killed"]
    moments = random.Random(3)
    for file in ("config.json", "metrics.jsonl"):
        before = {path: path.read_bytes() for path in (tmp_path / "killed").glob(f"*/{file}")}
        process, limit = start_maple(*command, "--jobs", 2), time.monotonic() + 100
        while process.returncode is None and time.monotonic() < limit:
            if any(path.read_bytes() != before.get(path) for path in (tmp_path / "killed").glob(f"*/{file}")):
                break
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.1))
        process.kill_group()
        assert process.wait() == -signal.SIGKILL, process.stderr
    assert not all((path.parent / "rows.jsonl").exists() for path in (tmp_path / "killed").glob("*/config.json"))
    done = run_maple(*command)
    assert done.returncode == 0, done.stderr
    assert rows_below(tmp_path / "killed") == rows_below(tmp_path / "straight")
    assert len(rows_below(tmp_path / "killed")) == 2
