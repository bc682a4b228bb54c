"""`kill -9` at any moment: the same command, repeated, comes to the same bytes."""

import itertools
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from forked import ForkedProcess, killed_at_flush, run_maple, start_maple

from maple.config import resolve
from maple.runs import train_run
from maple.runs.spec import open_backbone

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name != "posix", reason="needs fork and SIGKILL")]

FILES = ("prompts.safetensors", "metrics.jsonl", "items.json", "config.json")


def every_moment(images: str, work: Path) -> None:
    """Train runs that are killed at each of their flushes to the disk, and resumed; write how many there are.

    One process loads the CLIP once and forks a child for each moment. The optimizer changes with the epoch: one is
    killed at all writes of the first epoch, the other at all of the second.
    """
    layer = {
        "method": {"name": "maple", "prompt_depth": 1},
        "backbone": {"name": "maple-tiny", "pretrained": "random"},
        "data": {"dataset": images, "shots": 2},
    }
    train = {"epochs": 2, "batch_size": 4, "lr": 0.01}
    chosen = {"sgd": "last", "adamw": "best"}  # with a best state among what is resumed
    settings = {
        name: resolve([{**layer, "train": {**train, "optimizer": name, "keep": keep}}]) for name, keep in chosen.items()
    }
    backbone = open_backbone(settings["sgd"], "cpu")

    def train_until(moment: int, optimizer: str, folder: Path) -> int:
        return killed_at_flush(moment, lambda: train_run(settings[optimizer], folder, device="cpu", backbone=backbone))

    def contents(folder: Path) -> list[bytes]:
        return [(folder / name).read_bytes() for name in FILES]

    for optimizer in settings:
        assert train_until(0, optimizer, work / optimizer) == 0
    for moment in itertools.count(1):
        # Five files are written before the first epoch, and two after each; each is flushed, then its folder.
        epoch = ((moment - 1) // 2 - 5) // 2
        optimizer, folder = ("sgd", "adamw")[epoch % 2], work / f"killed-{moment}"
        status = train_until(moment, optimizer, folder)
        if status == 0:
            sys.stdout.write(str(moment - 1))
            return
        assert os.WIFSIGNALED(status), status
        assert train_until(0, optimizer, folder) == 0, moment
        assert contents(folder) == contents(work / optimizer), moment
        assert not (folder / "resume.safetensors").exists(), moment


def each_stage(images: str, work: Path) -> None:
    """Train a method of two stages, killed after each of its epochs and resumed; write how many epochs it has.

    The first stage ends within the second epoch.
    """
    train = {"epochs": 4, "batch_size": 2, "lr": 0.01, "optimizer": "adamw", "schedule": "cosine_per_step"}
    settings = resolve(
        [
            {
                "method": {"name": "two_stage", "tuned": "lora", "fraction": 0.4},
                "backbone": {"name": "maple-tiny", "pretrained": "random"},
                "data": {"dataset": images, "shots": 2},
                "train": train,
            }
        ]
    )
    backbone = open_backbone(settings, "cpu")

    def train_until(moment: int, folder: Path) -> int:
        return killed_at_flush(moment, lambda: train_run(settings, folder, device="cpu", backbone=backbone))

    assert train_until(0, work / "straight") == 0
    epochs = len((work / "straight/metrics.jsonl").read_text().splitlines())
    for epoch in range(1, epochs + 1):
        folder = work / f"killed-{epoch}"
        # Flushes as above: after both files of an epoch, at the first one of what follows.
        assert os.WIFSIGNALED(train_until(2 * (5 + 2 * epoch) + 1, folder))
        assert len((folder / "metrics.jsonl").read_text().splitlines()) >= epoch
        assert train_until(0, folder) == 0, epoch
        for name in FILES:
            assert (folder / name).read_bytes() == (work / "straight" / name).read_bytes(), (epoch, name)
    sys.stdout.write(str(epochs))


def test_killed_in_each_stage(make_images: Callable[..., Path], tmp_path: Path) -> None:
    process = ForkedProcess(each_stage, str(make_images(classes=("cat", "dog"), train=3)), tmp_path)
    assert process.wait() == 0, process.stderr
    assert process.stdout == "5"


def test_killed_at_every_write(make_images: Callable[..., Path], tmp_path: Path) -> None:
    process = ForkedProcess(every_moment, str(make_images(classes=("cat", "dog"), train=3)), tmp_path)
    assert process.wait() == 0, process.stderr
    # Five files at the start, two after each of two epochs, two at the end; each flushed, then its folder.
    assert int(process.stdout) == 2 * (5 + 2 * 2 + 2)


def command(images: Path, output: Path) -> list[str]:
    train = ["epochs=60", "batch_size=4", "lr=0.01"]
    return [
        *("train", "--dataset", str(images), "--device", "cpu", "--shots", "all"),
        *("--backbone", "maple-tiny", "--pretrained", "random", "--output", str(output)),
        *(part for setting in ["method.prompt_depth=1", *(f"train.{t}" for t in train)] for part in ("--set", setting)),
    ]


def test_the_command_killed_at_random_moments(make_images: Callable[..., Path], tmp_path: Path) -> None:
    images, generator = make_images(classes=("cat", "dog"), train=2), random.Random(os.getpid())
    metrics, finished = tmp_path / "killed/metrics.jsonl", tmp_path / "killed/prompts.safetensors"
    kills = []
    for _ in range(2):
        process = start_maple(*command(images, tmp_path / "killed"))
        before, limit = metrics.read_bytes() if metrics.exists() else b"", time.monotonic() + 100
        while process.returncode is None and time.monotonic() < limit:
            if metrics.exists() and metrics.read_bytes() != before:
                break
            time.sleep(0.002)
        time.sleep(generator.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        kills.append(process.wait())
    assert not finished.exists()
    assert kills == [-signal.SIGKILL] * 2
    epochs = len(metrics.read_text().splitlines())
    assert 0 < epochs < 60
    for folder in ("killed", "straight"):
        done = run_maple(*command(images, tmp_path / folder))
        assert done.returncode == 0, done.stderr
        assert ("resuming after epoch" in done.stderr) == (folder == "killed")
    assert finished.read_bytes() == (tmp_path / "straight/prompts.safetensors").read_bytes()
    assert metrics.read_bytes() == (tmp_path / "straight/metrics.jsonl").read_bytes()
    assert sorted(path.name for path in finished.parent.iterdir()) == sorted(
        path.name for path in (tmp_path / "straight").iterdir()
    )
