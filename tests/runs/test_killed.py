"""`kill -9` at any moment: the same command, repeated, comes to the same bytes."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name != "posix", reason="needs fork and SIGKILL")]

# One process loads the CLIP once and forks a child for each moment, so that every moment can be tried: the child kills
# itself at its n-th flush to the disk, of a file (written, not yet in its place) or of its folder (in its place).
EVERY_MOMENT = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from maple.config import resolve
from maple.runs import training

images, work, optimizer = sys.argv[1:]
settings = resolve([{
    "method": {"name": "maple", "prompt_depth": 1},
    "backbone": {"name": "maple-tiny", "pretrained": "random"},
    "data": {"dataset": images, "shots": None},
    "train": {"epochs": 2, "batch_size": 4, "lr": 0.01, "optimizer": optimizer},
}])
backbone = training.open_backbone(settings, "cpu")
training.open_backbone = lambda *_: backbone

def child(folder, deadly):
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    flush, done = os.fsync, [0]
    def fsync(descriptor):
        done[0] += 1
        if done[0] == deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        flush(descriptor)
    os.fsync = fsync
    try:
        training.train_run(settings, folder, device="cpu")
    except BaseException as error:
        print(repr(error), file=sys.stderr)
        os._exit(1)
    os._exit(0)

def content(folder):
    return {n: (folder / n).read_bytes() for n in ("prompts.safetensors", "metrics.jsonl", "items.json", "config.json")}

assert child(Path(work) / "straight", 0) == 0
expected = content(Path(work) / "straight")
moment = 0
while True:
    moment += 1
    folder = Path(work) / f"killed-{moment}"
    status = child(folder, moment)
    if status == 0:
        break
    assert os.WIFSIGNALED(status), status
    assert child(folder, 0) == 0, moment
    assert content(folder) == expected, moment
    assert not (folder / "resume.safetensors").exists(), moment
print(moment - 1)
"""


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_killed_at_every_write(optimizer: str, make_images: Callable[..., Path], tmp_path: Path) -> None:
    images = make_images(classes=("cat", "dog"))
    done = subprocess.run(
        [sys.executable, "-c", EVERY_MOMENT, str(images), str(tmp_path), optimizer],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    # Five files at the start, two after each of two epochs, two at the end; each flushed, then its folder.
    assert int(done.stdout) == 2 * (5 + 2 * 2 + 2)


def command(images: Path, output: Path) -> list[str]:
    train = ["epochs=60", "batch_size=4", "lr=0.01"]
    return [
        *(sys.executable, "-m", "maple", "train", "--dataset", str(images), "--device", "cpu", "--shots", "all"),
        *("--backbone", "maple-tiny", "--pretrained", "random", "--output", str(output)),
        *(part for setting in ["method.prompt_depth=1", *(f"train.{t}" for t in train)] for part in ("--set", setting)),
    ]


def test_the_command_killed_at_random_moments(make_images: Callable[..., Path], tmp_path: Path) -> None:
    images, generator = make_images(classes=("cat", "dog")), random.Random(os.getpid())
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    metrics, finished = tmp_path / "killed/metrics.jsonl", tmp_path / "killed/prompts.safetensors"
    kills = []
    for _ in range(2):
        process = subprocess.Popen(
            command(images, tmp_path / "killed"),
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        before, limit = metrics.read_bytes() if metrics.exists() else b"", time.monotonic() + 100
        while process.poll() is None and time.monotonic() < limit:
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
        arguments = command(images, tmp_path / folder)
        done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False, timeout=240)
        assert done.returncode == 0, done.stderr
        assert ("resuming after epoch" in done.stderr) == (folder == "killed")
    assert finished.read_bytes() == (tmp_path / "straight/prompts.safetensors").read_bytes()
    assert metrics.read_bytes() == (tmp_path / "straight/metrics.jsonl").read_bytes()
    assert sorted(path.name for path in finished.parent.iterdir()) == sorted(
        path.name for path in (tmp_path / "straight").iterdir()
    )
