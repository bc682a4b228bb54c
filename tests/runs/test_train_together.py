"""Runs that train together leave the folders that they leave alone, whatever happens to one of them, or to all."""

import itertools
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import ForkedProcess, killed_at_flush

from maple.checkpoint import read_tensors
from maple.clip import Backbone
from maple.config import RunSettings, resolve
from maple.errors import BusyError, ConfigError, ImageError, MapleError, TrainingDivergedError
from maple.runs import TrainProgress, TrainResult, train_run, train_together
from maple.runs.folder import lock_folder
from maple.runs.spec import open_backbone
from maple.train import EpochReport

Make = Callable[..., RunSettings]
Runs = list[tuple[RunSettings, Path]]
MAPLE: dict[str, Any] = {"name": "maple", "prompt_depth": 1}


def seeds(settings: RunSettings, root: Path, count: int = 3) -> Runs:
    """Runs with other seeds and rates, a few shots each, so that they see other images."""
    data = settings.data.changed(shots=2)
    made = []
    for seed in range(1, count + 1):
        train = settings.train.changed(lr=0.01 * seed, weight_decay=0.001 * seed)
        made.append((settings.changed(seed=seed, train=train, data=data), root / f"seed{seed}"))
    return made


@pytest.fixture(scope="module")
def tiny() -> Backbone:
    return open_backbone(RunSettings(backbone={"name": "maple-tiny", "pretrained": "random"}), "cpu")


def same_folders(one: Path, other: Path) -> None:
    """The same bytes where nothing is computed, the same numbers but for rounding where something is."""
    assert sorted(path.name for path in one.iterdir()) == sorted(path.name for path in other.iterdir())
    for name in ("config.json", "items.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes()
    histories = [path.read_text().splitlines() for folder in (one, other) for path in folder.glob("metrics.jsonl")]
    for a, b in zip(*histories, strict=True):
        found, expected = json.loads(a), json.loads(b)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert found[key] == pytest.approx(value, rel=1e-4, abs=1e-5), key
    (tensors, info), (expected_tensors, plain) = (
        read_tensors(folder / "prompts.safetensors") for folder in (one, other)
    )
    torch.testing.assert_close(tensors, expected_tensors, rtol=1e-4, atol=1e-5)
    losses = [found["info"]["train"].pop("loss") for found in (info, plain)]
    assert losses[0] == (None if losses[1] is None else pytest.approx(losses[1], rel=1e-4))
    assert info == plain


class Notes(TrainProgress):
    def __init__(self) -> None:
        self.heard: list[Any] = []

    def start(self, epochs: int, steps: int, finished_epochs: int) -> None:
        self.heard.append((epochs, steps, finished_epochs))

    def epoch(self, report: EpochReport) -> None:
        self.heard.append(report.epoch)


@pytest.mark.parametrize(
    ("method", "train"),
    [
        (MAPLE, {"optimizer": "adamw", "epochs": 3}),
        ({"name": "promptsrc", "prompts": MAPLE, "teacher_templates": ["a {}.", "the {}."]}, {}),
        ({"name": "coop", "prompt_length": 2}, {"views": 2, "drop_last": False, "batch_size": 3}),
        ({"name": "zero_shot"}, {}),
    ],
    ids=["maple", "promptsrc", "coop on features", "nothing to train"],
)
def test_each_folder_is_what_the_run_alone_leaves(
    method: dict[str, Any],
    train: dict[str, Any],
    tiny: Backbone,
    make_images: Callable[..., Path],
    settings_for: Make,
    tmp_path: Path,
) -> None:
    settings = settings_for(make_images(), method, **train)
    beside, alone = seeds(settings, tmp_path / "beside"), seeds(settings, tmp_path / "alone")
    notes = [Notes() for _ in beside]
    results = train_together(beside, device="cpu", progress=notes, backbone=tiny)
    for (own, folder), (_, plain), result, heard in zip(beside, alone, results, notes, strict=True):
        expected = Notes()
        train_run(own, plain, device="cpu", progress=expected, backbone=tiny)
        assert isinstance(result, TrainResult)
        assert not result.was_finished
        assert heard.heard == expected.heard
        same_folders(folder, plain)
    again = train_together(beside, device="cpu", backbone=tiny)
    assert [result.was_finished for result in again if isinstance(result, TrainResult)] == [True] * 3


def test_what_happens_to_one_does_not_happen_to_the_others(
    tiny: Backbone, make_images: Callable[..., Path], settings_for: Make, tmp_path: Path
) -> None:
    images = make_images(train=2)
    runs = seeds(settings_for(images, MAPLE), tmp_path / "beside", 5)
    diverging, busy, finished, foreign, good = range(5)
    train = runs[0][0].train.changed(lr=1e30, weight_decay=0.0)
    runs[diverging] = (runs[0][0].changed(train=train), runs[0][1])
    train_run(*runs[finished], device="cpu", backbone=tiny)
    runs[foreign][1].mkdir(parents=True)
    (runs[foreign][1] / "config.json").write_text("{")
    with lock_folder(runs[busy][1]):
        results = train_together(runs, device="cpu", backbone=tiny)
    assert isinstance(results[diverging], TrainingDivergedError)
    assert isinstance(results[busy], BusyError)
    assert isinstance(results[foreign], MapleError)
    assert [getattr(results[number], "was_finished", None) for number in (finished, good)] == [True, False]
    train_run(runs[good][0], tmp_path / "alone", device="cpu", backbone=tiny)
    same_folders(runs[good][1], tmp_path / "alone")
    with pytest.raises(TrainingDivergedError) as alone:
        train_run(*runs[diverging], device="cpu", backbone=tiny)
    assert str(alone.value).partition(" at step")[2] == str(results[diverging]).partition(" at step")[2]


def test_a_damaged_image_is_the_affair_of_those_that_see_it(
    tiny: Backbone, make_images: Callable[..., Path], settings_for: Make, tmp_path: Path
) -> None:
    images = make_images(classes=("cat", "dog"), train=6)
    settings = settings_for(images, MAPLE)
    runs = seeds(settings, tmp_path / "beside", 4)
    for own, _ in runs:
        train_run(own.changed(train=own.train.changed(epochs=0)), tmp_path / f"look{own.seed}", backbone=tiny)
    seen = [
        {item["path"] for item in json.loads((tmp_path / f"look{own.seed}/items.json").read_text())["items"]}
        for own, _ in runs
    ]
    (victim, *_) = sorted(seen[0] - seen[1])
    (images / victim).write_bytes(b"no image")
    results = train_together(runs, device="cpu", backbone=tiny)
    hit = [victim in paths for paths in seen]
    assert [isinstance(result, ImageError) for result in results] == hit
    assert [isinstance(result, TrainResult) for result in results] == [not one for one in hit]


def test_what_cannot_train_together_is_refused(
    make_images: Callable[..., Path], settings_for: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_for(make_images(), MAPLE)
    longer = settings.changed(train=settings.train.changed(epochs=9))
    with pytest.raises(ConfigError, match=r"may differ in seed, train\.lr and train\.weight_decay, and these differ"):
        train_together([(settings, tmp_path / "a"), (longer, tmp_path / "b")])
    with pytest.raises(ConfigError, match="share the folder"):
        train_together([(settings, tmp_path / "a"), (settings.changed(seed=2), tmp_path / "b/../a")])
    monkeypatch.setattr("maple.runs.training.this_process", lambda _: type("Two", (), {"count": 2}))
    with pytest.raises(ConfigError, match="one of 2"):
        train_together([(settings, tmp_path / "a")])
    assert list(tmp_path.glob("[ab]")) == []


def every_seventh_moment(images: str, work: Path) -> None:
    """Train two runs together, killed at every seventh flush to the disk, and resume them together or alone.

    One process loads the CLIP once and forks a child for each moment.
    """
    layer = {
        "method": {"name": "maple", "prompt_depth": 1},
        "backbone": {"name": "maple-tiny", "pretrained": "random"},
        "data": {"dataset": images, "shots": None},
        "train": {"epochs": 2, "batch_size": 4, "lr": 0.01},
    }
    settings = [resolve([{**layer, "seed": seed}]) for seed in (1, 2)]
    backbone = open_backbone(settings[0], "cpu")

    def both(name: str) -> None:
        train_together([(one, work / name / str(one.seed)) for one in settings], device="cpu", backbone=backbone)

    def one_by_one(name: str) -> None:
        for one in settings:
            train_run(one, work / name / str(one.seed), device="cpu", backbone=backbone)

    assert killed_at_flush(0, lambda: one_by_one("alone")) == 0
    for moment in itertools.count(7, 7):
        name = f"killed-{moment}"
        status = killed_at_flush(moment, partial(both, name))
        if status == 0:
            return
        assert os.WIFSIGNALED(status), status
        assert killed_at_flush(0, partial(one_by_one if moment % 2 else both, name)) == 0, moment


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs fork and SIGKILL")
def test_killed_while_together_they_go_on_together_or_alone(make_images: Callable[..., Path], tmp_path: Path) -> None:
    process = ForkedProcess(every_seventh_moment, str(make_images(classes=("cat", "dog"), train=2)), tmp_path)
    assert process.wait() == 0, process.stderr
    killed = sorted(tmp_path.glob("killed-*/*"))
    # Of each run five files at the start, two after each of two epochs, two at the end; each flushed, then its folder.
    assert len(killed) == 2 * (2 * 2 * (5 + 2 * 2 + 2) // 7 + 1)
    for folder in killed:
        same_folders(folder, tmp_path / "alone" / folder.name)
