"""The examples run as written, with little data."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from maple.checkpoint import load_prompts
from maple.clip import load_clip

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_train_maple(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.safetensors"
    arguments = ["--dataset", "emoji-activities/lineart", "--shots", "1", "--epochs", "2", "--test-images", "12"]
    monkeypatch.setattr(sys, "argv", ["train_maple.py", *arguments, "--output", str(prompts)])
    runpy.run_path(str(EXAMPLES / "train_maple.py"), run_name="__main__")
    printed = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", printed)]
    assert len(losses) == 2
    assert losses[1] < losses[0]
    assert re.search(r"^zero-shot CLIP: base [\d.]+%, novel [\d.]+%, harmonic mean [\d.]+%$", printed, re.M)
    assert re.search(r"^MaPLe: base [\d.]+%, novel [\d.]+%, harmonic mean [\d.]+%$", printed, re.M)
    method = load_prompts(prompts, load_clip("maple-small", device="cpu"))
    assert method.parameter_count() == 75_072


def test_every_example_has_a_test() -> None:
    """A new example needs a test here."""
    assert [path.name for path in EXAMPLES.glob("*.py")] == ["train_maple.py"]


@pytest.mark.skipif(os.name != "posix", reason="needs bash")
@pytest.mark.parametrize(
    ("status", "left", "expected"), [(0, "new", 0), (1, "new", 0), (1, "failed", 1), (2, "new", 2)]
)
def test_slurm_sweep_fails_only_with_its_runs(status: int, left: str, expected: int, tmp_path: Path) -> None:
    """A task that ends while others are training is not a failure; `maple` is replaced by what it answers."""
    maple = tmp_path / "maple"
    plan = f"""echo '{{"status": "{left}"}}'; exit 0"""
    maple.write_text(f'#!/bin/sh\necho "$@" >&2\ncase "$*" in *--plan*) {plan};; esac\nexit {status}\n')
    maple.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "MAPLE_RUNS": "shared", "SLURM_ARRAY_TASK_ID": "3"}
    command = ["bash", str(EXAMPLES / "slurm_sweep.sh"), "demo", "--set", "data.listing=a b"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == expected
    assert done.stderr.splitlines()[0] == "sweep demo --set data.listing=a b --output shared"
    assert "task 3 of job none" in done.stdout
