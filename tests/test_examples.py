"""The examples run as written, with little data."""

import re
import runpy
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
