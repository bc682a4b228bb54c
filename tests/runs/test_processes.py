"""Several processes, as `accelerate launch` starts them: the same prompts as one, and one that writes."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from maple.checkpoint import read_prompts
from maple.distributed import Processes, this_process
from maple.runs import read_history

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
    images = make_images(classes=("cat", "dog"), train=5)
    # Ten images in batches of 3: shares of 1 and 2, and a last batch of 1, of which one process gets nothing.
    train = ["epochs=3", "batch_size=3", "drop_last=false", "lr=0.02"]
    arguments = [
        *("train", "--dataset", str(images), "--device", "cpu", "--shots", "all"),
        *("--backbone", "maple-tiny", "--pretrained", "random", "--set", "method.prompt_depth=2"),
        *(part for setting in train for part in ("--set", f"train.{setting}")),
    ]
    starts = {"two": ACCELERATE, "one": [sys.executable, "-m", "maple"]}
    for name, start in starts.items():
        done = run(start, [*arguments, "--output", str(tmp_path / name)], tmp_path / "witness")
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("finished: ") == 1, "one process talks"
    there = {path.name: path.read_text() for path in (tmp_path / "witness").glob("rank*")}
    assert there == {"rank0of2": "left", "rank1of2": "left"}
    one, two = (read_prompts(tmp_path / name / "prompts.safetensors") for name in ("one", "two"))
    torch.testing.assert_close(two.tensors, one.tensors, rtol=0, atol=1e-5)
    histories = [read_history(tmp_path / name) for name in ("one", "two")]
    for alone, shared in zip(*histories, strict=True):
        assert len(alone.losses) == 4
        assert shared.losses == pytest.approx(alone.losses, rel=1e-4)
        assert shared.logs == pytest.approx(alone.logs, rel=1e-4)
    assert {path.name for path in (tmp_path / "one").iterdir()} == {path.name for path in (tmp_path / "two").iterdir()}


@pytest.mark.slow
def test_a_failure_of_the_processes_is_the_launchers(tmp_path: Path) -> None:
    arguments = ["train", "--dataset", str(tmp_path / "nowhere"), "--output", str(tmp_path / "o")]
    done = run(TORCHRUN, arguments, tmp_path / "witness")
    assert done.returncode != 0
    assert "unknown data set" in done.stderr
    assert not (tmp_path / "o").exists()


def test_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    found = this_process("cpu")
    assert (found.rank, found.count, found.device, found.is_main) == (0, 1, torch.device("cpu"), True)
    tensor = torch.ones(2)
    found.sum_([tensor])
    found.wait()
    assert tensor.tolist() == [1, 1]
    assert not Processes(1, 2, torch.device("cpu")).is_main
