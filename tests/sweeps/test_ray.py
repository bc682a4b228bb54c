"""Sweeps on a real Ray cluster of this machine: the same rows as one process, whatever is killed."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sweep_tools import Watcher, rows_below, small_sweep

from maple.errors import ConfigError
from maple.sweeps import Outcome, PlannedRun, on_ray, run_group, run_sweep

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'maple-clip[ray]'")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL"),
    # Ray leaves pipes and sockets of the cluster's processes to the garbage collector.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def _cluster() -> Iterator[None]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()


def runs_of(images: Path, epochs: int = 2) -> list[PlannedRun]:
    grid = {"vision_prompt_depth": [2], "train.epochs": [epochs]}
    return small_sweep(images, methods=["vpt"], seeds=[1, 2, 3], grid=grid)


def noting(pids: Path) -> Callable[..., list[Outcome]]:
    """`run_group`, slowed down, that writes down in which process each run is. Inside, so that it travels by value."""

    def work(
        group: tuple[PlannedRun, ...], root: Path, device: str | None, report: Callable[..., None]
    ) -> list[Outcome]:
        for run in group:
            (pids / f"{run.name}.{os.getpid()}").touch()

        def slow(*told: Any) -> None:
            time.sleep(0.3)
            report(*told)

        return run_group(group, root, device, slow)

    return work


def tries(pids: Path, name: str) -> list[int]:
    return [int(path.suffix[1:]) for path in pids.glob(f"{name}.*")]


@pytest.mark.usefixtures("_cluster")
def test_two_workers_give_the_rows_of_one_process(make_images: Callable[..., Path], tmp_path: Path) -> None:
    runs, pids = runs_of(make_images()), tmp_path / "pids"
    pids.mkdir()
    alone = run_sweep(runs, tmp_path / "alone", device="cpu", progress=Watcher())
    watcher = Watcher()
    outcomes = run_sweep(runs, tmp_path / "ray", executor=on_ray, work=noting(pids), progress=watcher)
    assert [outcome.status for outcome in outcomes] == ["finished"] * 3
    assert len({pid for run in runs for pid in tries(pids, run.name)}) == 2, "two cores, two workers"
    assert rows_below(tmp_path / "ray") == rows_below(tmp_path / "alone")
    assert len(rows_below(tmp_path / "alone")) == 3
    assert [len(outcome.rows) for outcome in outcomes] == [len(outcome.rows) for outcome in alone] == [2, 2, 2]
    assert {name for name, _ in watcher.told} == {run.name for run in runs}, "workers say how far they are"
    kept = Watcher()
    assert run_sweep(runs, tmp_path / "ray", executor=on_ray, progress=kept)[0].rows == outcomes[0].rows
    assert kept.told == []
    assert len(list((tmp_path / "ray").glob(".sweep-*"))) == 1


@pytest.mark.usefixtures("_cluster")
def test_a_worker_killed_in_mid_run_is_replaced(make_images: Callable[..., Path], tmp_path: Path) -> None:
    runs, pids = runs_of(make_images(), epochs=6)[:2], tmp_path / "pids"
    pids.mkdir()
    run_sweep(runs, tmp_path / "alone", device="cpu", progress=Watcher())
    killed: list[int] = []

    class Killer(Watcher):
        def doing(self, name: str, what: str, done: int, total: int) -> None:
            super().doing(name, what, done, total)
            if not killed and what.startswith("epoch") and 0 < done < total:
                killed.extend(tries(pids, name))
                os.kill(killed[0], signal.SIGKILL)
                self.victim = name

    killer = Killer()
    outcomes = run_sweep(runs, tmp_path / "ray", executor=on_ray, work=noting(pids), progress=killer)
    assert [outcome.status for outcome in outcomes] == ["finished"] * 2
    assert len(killed) == 1
    assert len(tries(pids, killer.victim)) == 2, "another process took over"
    assert rows_below(tmp_path / "ray") == rows_below(tmp_path / "alone")


@pytest.mark.usefixtures("_cluster")
def test_failures_are_recorded_and_deaths_do_not_go_on_forever(
    make_images: Callable[..., Path], tmp_path: Path
) -> None:
    images = make_images()
    deep = small_sweep(images, methods=["vpt"])  # VPT's recipe prompts 12 layers; this CLIP has 4
    (outcome,) = run_sweep(deep, tmp_path, executor=on_ray, progress=Watcher())
    assert outcome.status == "failed"
    assert "the image tower has 4 blocks" in str(outcome.error)

    def dies(*given: Any) -> list[Outcome]:
        del given
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    other = small_sweep(images, methods=["zero_shot"])
    (outcome,) = run_sweep(other, tmp_path, executor=on_ray, work=dies, progress=Watcher())
    assert outcome.status == "failed"
    assert "its Ray worker died 3 times" in str(outcome.error)
    assert (tmp_path / other[0].name / "failure.json").is_file()


@pytest.mark.usefixtures("_cluster")
def test_results_come_through_a_storage(make_images: Callable[..., Path], tmp_path: Path) -> None:
    runs, url = runs_of(make_images())[:2], f"file://{tmp_path}/bucket"
    run_sweep(runs, tmp_path / "alone", device="cpu", progress=Watcher())
    outcome, other = run_sweep(
        runs, tmp_path / "here", together=2, executor=lambda *given: on_ray(*given, storage=url), progress=Watcher()
    )
    assert outcome.status == other.status == "finished"
    assert rows_below(tmp_path / "here") == rows_below(tmp_path / "alone")
    folder = tmp_path / "here" / runs[0].name
    assert {path.name for path in folder.iterdir()} >= {"config.json", "prompts.safetensors", "predictions"}
    assert not list(folder.glob("resume*"))
    # A sweep that lost its own folder finds what others have left.
    watcher = Watcher()
    again = run_sweep(runs, tmp_path / "lost", executor=lambda *given: on_ray(*given, storage=url), progress=watcher)
    assert (again[0].status, watcher.told) == ("finished", [])
    assert again[0].rows == outcome.rows


@pytest.mark.usefixtures("_cluster")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cpus_per_run": 64}, "--cpus-per-run 64: .*the machine with most cores has 2"),
        ({"gpus_per_run": 1.5}, "--gpus-per-run 1.5: a run takes a fraction of a GPU, or whole ones"),
        ({"gpus_per_run": 200}, "the machine with most has"),
        ({"storage": "nowhere://bucket"}, "the storage 'nowhere://bucket' cannot be opened"),
    ],
)
def test_what_cannot_be_is_refused(
    options: dict[str, Any], message: str, make_images: Callable[..., Path], tmp_path: Path
) -> None:
    runs = runs_of(make_images())
    with pytest.raises(ConfigError, match=message):
        run_sweep(runs, tmp_path, executor=lambda *given: on_ray(*given, **options), progress=Watcher())


@pytest.mark.usefixtures("_cluster")
def test_a_folder_that_workers_do_not_see_is_refused(
    make_images: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The marker is written somewhere else."""
    runs = runs_of(make_images())
    monkeypatch.setattr("maple.files.write_text", lambda _path, _text: None)
    with pytest.raises(ConfigError, match=r"does not see the folder .*--output must name a folder .*--ray-storage"):
        run_sweep(runs, tmp_path, executor=on_ray, progress=Watcher())


def test_without_ray_it_is_said(
    make_images: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("maple.sweeps.ray_executor.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install 'maple-clip\[ray\]'"):
        run_sweep(runs_of(make_images()), tmp_path, executor=on_ray, progress=Watcher())
