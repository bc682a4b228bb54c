"""Sweeps on a real Ray cluster on this machine: the same rows as in one process, whatever is killed."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sweep_tools import RecordedProgress, rows_below, small_sweep

from maple.errors import ConfigError
from maple.sweeps import PlannedRun, RunOutcome, on_ray, ray_executor, run_sweep
from maple.sweeps.runner import run_group

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'maple-clip[ray]'")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL"),
    # Ray leaves pipes and sockets of the cluster's processes to the garbage collector.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def runs_of(images: Path, epochs: int = 2) -> list[PlannedRun]:
    grid = {"vision_prompt_depth": [2], "train.epochs": [epochs]}
    return small_sweep(images, methods=["vpt"], seeds=[1, 2, 3], grid=grid)


def noting(pids: Path) -> Callable[..., list[RunOutcome]]:
    """Return a slow `run_group` that records the process of each run; it is local, so that Ray pickles it by value."""

    def work(
        group: tuple[PlannedRun, ...], root: Path, device: str | None, report: Callable[..., None]
    ) -> list[RunOutcome]:
        for run in group:
            (pids / f"{run.name}.{os.getpid()}").touch()

        def slow(*progress: Any) -> None:
            time.sleep(0.2)
            report(*progress)

        return run_group(group, root, device, slow)

    return work


def tries(pids: Path, name: str) -> list[int]:
    return [int(path.suffix[1:]) for path in pids.glob(f"{name}.*")]


@pytest.mark.usefixtures("ray_cluster")
def test_two_workers_one_of_which_is_killed_give_the_rows_of_one_process(
    make_images: Callable[..., Path], tmp_path: Path
) -> None:
    runs, pids = runs_of(make_images(), epochs=4), tmp_path / "pids"
    pids.mkdir()
    alone = run_sweep(runs, tmp_path / "alone", device="cpu", progress=RecordedProgress())
    killed: list[int] = []

    class Killer(RecordedProgress):
        def advance(self, name: str, activity: str, done: int, total: int) -> None:
            super().advance(name, activity, done, total)
            started = {pid for run in runs for pid in tries(pids, run.name)}
            # Two cores, two workers: none is killed before both have begun.
            if not killed and len(started) == 2 and activity.startswith("epoch") and 0 < done < total:
                killed.extend(tries(pids, name))
                os.kill(killed[0], signal.SIGKILL)
                self.victim = name

    killer = Killer()
    outcomes = run_sweep(runs, tmp_path / "ray", executor=on_ray, work=noting(pids), progress=killer)
    assert [outcome.status for outcome in outcomes] == ["finished"] * 3
    assert len(killed) == 1
    assert len(tries(pids, killer.victim)) == 2, "another process took over"
    assert rows_below(tmp_path / "ray") == rows_below(tmp_path / "alone")
    assert len(rows_below(tmp_path / "alone")) == 3
    assert [len(outcome.rows) for outcome in outcomes] == [len(outcome.rows) for outcome in alone] == [2, 2, 2]
    assert {name for name, _ in killer.activities} == {run.name for run in runs}, "workers report their progress"
    kept = RecordedProgress()
    assert run_sweep(runs, tmp_path / "ray", executor=on_ray, progress=kept)[0].rows == outcomes[0].rows
    assert kept.activities == []
    assert len(list((tmp_path / "ray").glob(".sweep-*"))) == 1


@pytest.mark.usefixtures("ray_cluster")
def test_failures_are_recorded_and_dying_workers_are_given_up(
    make_images: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = make_images()
    deep = small_sweep(images, methods=["vpt"])  # VPT's recipe prompts 12 layers; this CLIP has 4
    (outcome,) = run_sweep(deep, tmp_path, executor=on_ray, progress=RecordedProgress())
    assert outcome.status == "failed"
    assert "the image tower has 4 blocks" in str(outcome.error)

    monkeypatch.setattr(ray_executor, "ATTEMPTS", 2)

    def dies(*_: Any) -> list[RunOutcome]:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    other = small_sweep(images, methods=["zero_shot"])
    (outcome,) = run_sweep(other, tmp_path, executor=on_ray, work=dies, progress=RecordedProgress())
    assert outcome.status == "failed"
    assert "its Ray worker died 2 times" in str(outcome.error)
    assert (tmp_path / other[0].name / "failure.json").is_file()


@pytest.mark.parametrize(
    ("error", "machines", "status"),
    [
        (ray.exceptions.LocalRayletDiedError(), {"a"}, "interrupted"),
        (ray.exceptions.NodeDiedError("gone"), {"a"}, "interrupted"),
        (ray.exceptions.ObjectStoreFullError("full"), {"a"}, "interrupted"),
        (ray.exceptions.RaySystemError("the GCS is gone"), {"a"}, "interrupted"),
        (ray.exceptions.RayTaskError("run", "AssertionError", AssertionError()), {"a"}, "interrupted"),
        (ray.exceptions.WorkerCrashedError(), {"a"}, "interrupted"),
        (ray.exceptions.WorkerCrashedError(), set(), "interrupted"),
        (ray.exceptions.WorkerCrashedError(), {"a", "b"}, "failed"),
        (ray.exceptions.OutOfMemoryError("out of memory"), {"a", "b"}, "failed"),
    ],
)
def test_what_the_cluster_lost_is_not_a_failure_of_its_run(
    error: Exception,
    machines: set[str],
    status: str,
    make_images: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A task ends in `error` when of the machines a and b only `machines` are left."""

    def get(_: object) -> None:
        raise error

    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(ray_executor, "_machines", lambda: machines)
    monkeypatch.setattr(ray_executor, "_NOTICE", 0)
    run = small_sweep(make_images(), methods=["zero_shot"])[0]
    (outcome,) = ray_executor._outcomes(None, (run,), tmp_path, None, {"a", "b"})
    assert outcome.status == status
    assert (tmp_path / run.name / "failure.json").exists() == (status == "failed")
    assert ("the Ray cluster lost a machine or one of its services" in str(outcome.error)) == (status != "failed")


def test_the_scratch_folder_is_this_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    store = ray_executor.Storage(f"file://{tmp_path}/bucket")
    folder = store.scratch()
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    assert store.scratch() == folder
    assert folder.stat().st_mode & 0o777 == 0o700
    with monkeypatch.context() as other:
        other.setattr(os, "getuid", lambda: -1)
        with pytest.raises(ConfigError, match="belongs to another user: remove it, or set TMPDIR"):
            store.scratch()
    folder.rmdir()
    folder.symlink_to(tmp_path)
    with pytest.raises(ConfigError, match="belongs to another user"):
        store.scratch()


@pytest.mark.usefixtures("ray_cluster")
def test_results_are_exchanged_through_a_storage(make_images: Callable[..., Path], tmp_path: Path) -> None:
    runs, url = runs_of(make_images())[:2], f"file://{tmp_path}/bucket"
    run_sweep(runs, tmp_path / "alone", device="cpu", progress=RecordedProgress())
    outcome, other = run_sweep(
        runs,
        tmp_path / "here",
        together=2,
        executor=lambda *arguments: on_ray(*arguments, storage=url),
        progress=RecordedProgress(),
    )
    assert outcome.status == other.status == "finished"
    assert rows_below(tmp_path / "here") == rows_below(tmp_path / "alone")
    folder = tmp_path / "here" / runs[0].name
    assert {path.name for path in folder.iterdir()} >= {"config.json", "prompts.safetensors", "predictions"}
    assert not list(folder.glob("resume*"))
    # A sweep that lost its own folder restores the stored runs.
    progress = RecordedProgress()
    again = run_sweep(
        runs, tmp_path / "lost", executor=lambda *arguments: on_ray(*arguments, storage=url), progress=progress
    )
    assert (again[0].status, progress.activities) == ("finished", [])
    assert again[0].rows == outcome.rows


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cpus_per_run": 64}, "--cpus-per-run 64: .*the machine with most cores has 2"),
        ({"gpus_per_run": 1.5}, "--gpus-per-run 1.5: each run takes a fraction of a GPU, or whole ones"),
        ({"gpus_per_run": 200}, "the machine with most has"),
        ({"storage": "nowhere://bucket"}, "the storage 'nowhere://bucket' cannot be opened"),
    ],
)
def test_impossible_options_are_refused(
    options: dict[str, Any], message: str, make_images: Callable[..., Path], tmp_path: Path
) -> None:
    runs = runs_of(make_images())
    with pytest.raises(ConfigError, match=message):
        run_sweep(
            runs, tmp_path, executor=lambda *arguments: on_ray(*arguments, **options), progress=RecordedProgress()
        )


@pytest.mark.usefixtures("ray_cluster")
def test_a_folder_that_is_not_shared_is_refused(
    make_images: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The marker is written somewhere else."""
    runs = runs_of(make_images())
    monkeypatch.setattr("maple.files.write_text", lambda _path, _text: None)
    with pytest.raises(ConfigError, match=r"does not see the folder .*--output must name a folder .*--ray-storage"):
        run_sweep(runs, tmp_path, executor=on_ray, progress=RecordedProgress())


def test_missing_ray_is_reported(
    make_images: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("maple.ray_cluster.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install 'maple-clip\[ray\]'"):
        run_sweep(runs_of(make_images()), tmp_path, executor=on_ray, progress=RecordedProgress())
