"""Several processes, as `accelerate launch` starts them: the same prompts as one, and one that writes."""

import math
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from forked import run_maple, start_maple
from PIL import Image
from torch import Tensor

from maple.checkpoint import read_prompts
from maple.clip import Backbone
from maple.config import TrainSettings
from maple.data import Batch
from maple.distributed import Processes, choose_device, this_process
from maple.errors import ConfigError, ImageError, MapleError
from maple.machine import memory_limit
from maple.methods import build_method
from maple.runs import read_history
from maple.sweeps import SweepSettings, on_ray, plan_sweep, run_sweep
from maple.sweeps.executors import in_processes
from maple.sweeps.runner import run_group
from maple.train import Trainer

# `--multi_gpu` is how accelerate is told to start several processes; without GPUs they talk through the CPU.
ACCELERATE = [
    *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m", "maple"),
]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "maple"]
# Every process of Python runs this at its start, and so its exit last of all: it tells who was there, and whether they
# left the group before the interpreter ended, without which gloo's threads abort the process now and then.
WITNESS = """
import atexit, os, pathlib, sys
def tell(file):
    distributed = sys.modules["torch.distributed"]
    file.write_text("still in it" if distributed.is_initialized() else "left")
if "RANK" in os.environ:
    file = pathlib.Path(__file__).with_name(f"rank{os.environ['RANK']}of{os.environ['WORLD_SIZE']}")
    atexit.register(tell, file)
"""


def run(start: list[str], arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(WITNESS)
    paths = [str(folder), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*start, *arguments], env=environment, capture_output=True, text=True, check=False, timeout=200
    )


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(make_images: Callable[..., Path], tmp_path: Path) -> None:
    images = make_images(classes=("cat", "dog"), train=7)
    # Ten images in batches of 3: shares of 1 and 2, and a last batch of 1, of which one process gets nothing.
    train = ["epochs=3", "batch_size=3", "drop_last=false", "lr=0.02", "keep=best"]
    arguments = [
        *("train", "--dataset", str(images), "--device", "cpu", "--shots", "5"),
        *("--backbone", "maple-tiny", "--pretrained", "random", "--set", "method.prompt_depth=2"),
        *(part for setting in train for part in ("--set", f"train.{setting}")),
    ]
    one = run_maple(*arguments, "--output", tmp_path / "one")
    two = run(ACCELERATE, [*arguments, "--output", str(tmp_path / "two")], tmp_path / "witness")
    for done in (one, two):
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("finished: ") == 1, "one process talks"
    there = {path.name: path.read_text() for path in (tmp_path / "witness").glob("rank*")}
    assert there == {"rank0of2": "left", "rank1of2": "left"}
    alone, shared = (read_prompts(tmp_path / name / "prompts.safetensors").tensors for name in ("one", "two"))
    torch.testing.assert_close(shared, alone, rtol=0, atol=1e-5)
    histories = [read_history(tmp_path / name) for name in ("one", "two")]
    for epoch, other in zip(*histories, strict=True):
        assert len(epoch.losses) == 4
        assert other.losses == pytest.approx(epoch.losses, rel=1e-4)
        assert other.logs == pytest.approx(epoch.logs, rel=1e-4)
        assert other.validation == pytest.approx(epoch.validation, rel=1e-4)
    assert {path.name for path in (tmp_path / "one").iterdir()} == {path.name for path in (tmp_path / "two").iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("part", ["train", "val"])
def test_an_image_that_one_process_cannot_read_ends_them_all(
    part: str, make_images: Callable[..., Path], tmp_path: Path
) -> None:
    """Each reads its share of the training images, and the first one reads those of the validation."""
    images = make_images(classes=("cat", "dog"))
    shutil.copytree(images / "test", images / "val")
    whole = images / part / "cat" / "1.png"
    Image.open(whole).save(whole.with_suffix(".jpg"))
    whole.unlink()
    damaged = whole.with_suffix(".jpg")
    damaged.write_bytes(damaged.read_bytes()[:-200])
    arguments = [
        *("train", "--dataset", images, "--device", "cpu", "--output", tmp_path / "o"),
        *("--backbone", "maple-tiny", "--pretrained", "random", "--set", "method.prompt_depth=2"),
        *("--set", "train.epochs=2", "--set", "train.keep=best"),
    ]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    both = [start_maple(*arguments, environment={**group, "RANK": rank, "LOCAL_RANK": rank}) for rank in "01"]
    try:
        assert all(process.wait() for process in both), [process.stderr for process in both]
    finally:
        for process in both:
            process.kill_group()
    told = [process.stderr.replace("\n", " ") for process in both]
    damage = f"{damaged.name}: cannot be decoded, damaged or truncated"
    assert sorted((damage in text, "another process failed" in text) for text in told) == [(False, True), (True, False)]
    assert not (tmp_path / "o" / "prompts.safetensors").exists()


def test_a_failure_of_another_process(monkeypatch: pytest.MonkeyPatch, backbone: Backbone, images: Tensor) -> None:
    failures: list[float] = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor.add_(failures.pop(0)))
    both, message = Processes(1, 2, torch.device("cpu")), "another process failed; its message says why"
    failures[:] = [0, 1, 1]
    with both.failing_together():
        pass
    with pytest.raises(MapleError, match=message), both.failing_together():
        pass
    with pytest.raises(ImageError, match="this one"), both.failing_together():
        raise ImageError("this one")
    method = build_method({"name": "maple", "prompt_depth": 2}, backbone, ["cat", "dog"])
    trainer = Trainer(method, TrainSettings(epochs=1), both)
    failures[:] = [1]
    with pytest.raises(MapleError, match=message):  # before its first step, which would wait for the other process
        trainer.run_epoch([(Batch(images[:2], torch.tensor([0, 1])), 4)])
    assert (trainer.epoch, failures) == (0, [])


@pytest.mark.slow
def test_a_failure_of_the_processes_is_the_launchers(tmp_path: Path) -> None:
    arguments = ["train", "--dataset", str(tmp_path / "nowhere"), "--output", str(tmp_path / "o")]
    done = run(TORCHRUN, arguments, tmp_path / "witness")
    assert done.returncode != 0
    assert "unknown data set" in done.stderr
    assert not (tmp_path / "o").exists()


def launch(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


COMPLETE = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29777"}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE is 'abc', which is not a number of processes; .* unset WORLD_SIZE"),
        ({"WORLD_SIZE": "2.0"}, "WORLD_SIZE is '2.0', which is not a number of processes"),
        (
            {"RANK": "", "MASTER_ADDR": ""},
            "WORLD_SIZE is 2, but a launcher also sets RANK and MASTER_ADDR; ",
        ),
        ({"MASTER_ADDR": ""}, "a launcher also sets MASTER_ADDR; to work in one process, unset WORLD_SIZE"),
        ({"RANK": "2"}, "RANK is '2'; with WORLD_SIZE 2 it is a number from 0 to 1"),
        ({"RANK": "-1"}, "RANK is '-1'"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK is 'x'; it is a number up to 1"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT is '99999'; it is a number up to 65535"),
    ],
)
def test_incomplete_variables_of_a_launcher(
    changed: dict[str, str],
    message: str,
    make_images: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    launch(monkeypatch, **{**COMPLETE, **changed})
    with pytest.raises(ConfigError, match=message):
        this_process("cpu")
    assert choose_device("cpu") == torch.device("cpu"), "what needs no other process works alone"
    images = str(make_images(classes=("cat", "dog")))
    settings = SweepSettings(protocol="base-to-novel", methods=["zero_shot"], datasets=[images], seeds=[1])
    with pytest.raises(ConfigError, match=message):
        run_sweep(plan_sweep(settings), tmp_path / "runs", device="cpu")
    assert not (tmp_path / "runs").exists()


def test_processes_that_do_not_come(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    launch(monkeypatch, **COMPLETE)
    monkeypatch.setattr("maple.distributed._SILENCE", 0.1)

    def in_vain(**_: object) -> None:
        time.sleep(0.5)
        raise torch.distributed.DistStoreError("Timed out after 2 seconds waiting for clients. 1/2 clients joined.")

    monkeypatch.setattr("accelerate.PartialState", in_vain)
    problem = "the 1 other process at 127.0.0.1:29777 cannot be joined: Timed out after 2 seconds .* unset WORLD_SIZE"
    with pytest.raises(ConfigError, match=problem):
        this_process("cpu")
    assert "waiting for 1 other process at 127.0.0.1:29777 (WORLD_SIZE is 2 and RANK is 0" in caplog.text
    for executor in (partial(in_processes, jobs=2), on_ray):
        with pytest.raises(ConfigError, match="WORLD_SIZE is 2, and this sweep starts its processes itself"):
            list(executor([], tmp_path, run_group, lambda *_: None))


@pytest.mark.parametrize(
    ("groups", "limits", "expected"),
    [
        ("0::/slurm/job_7/step_0\n", {"slurm/memory.max": "max", "slurm/job_7/memory.max": "300"}, 300),
        ("0::/\n", {"memory.max": "200\n"}, 200),
        ("0::/elsewhere\n", {"memory.max": "200"}, 200),
        ("0::/a\n", {"memory.max": "200", "a/memory.max": "max"}, 200),
        ("9:cpu:/a\n8:memory:/a\n0::/\n", {"memory/a/memory.limit_in_bytes": "400", "cpu/a/memory.max": "1"}, 400),
        (None, {"memory.max": "200"}, 200),
        (None, {}, math.inf),
    ],
)
def test_memory_of_control_groups(
    groups: str | None, limits: dict[str, str], expected: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("maple.machine._GROUP_OF_THIS", tmp_path / "groups")
    monkeypatch.setattr("maple.machine._GROUPS", tmp_path / "cgroup")
    if groups is not None:
        (tmp_path / "groups").write_text(groups)
    for name, limit in limits.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(limit)
    assert memory_limit() == expected


@pytest.mark.parametrize("size", ["", "0", "1", " 1 "])
def test_one_process(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launch(monkeypatch, **{**COMPLETE, "WORLD_SIZE": size})
    assert this_process("cpu") == Processes(0, 1, torch.device("cpu"))


def test_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    found = this_process("cpu")
    assert (found.rank, found.count, found.device, found.is_main) == (0, 1, torch.device("cpu"), True)
    tensor = torch.ones(2)
    found.sum_([tensor])
    found.wait()
    assert tensor.tolist() == [1, 1]
    assert not Processes(1, 2, torch.device("cpu")).is_main
