"""An export on a disk that refuses."""

import subprocess
import sys
from pathlib import Path

import pytest

from maple import build_method, load_clip, save_prompts


@pytest.mark.parametrize("form", ["onnx", "torchscript", "openclip"])
def test_a_full_disk_is_one_line(tmp_path: Path, form: str) -> None:
    method = build_method({"name": "coop"}, load_clip("maple-tiny", "random:1"), ["cat", "dog"])
    save_prompts(tmp_path / "prompts.safetensors", method)
    words = [sys.executable, "-m", "maple", "export", str(tmp_path / "prompts.safetensors")]
    words += ["--format", form, "--output", str(tmp_path / "exported")]
    done = subprocess.run(
        ["bash", "-c", 'ulimit -f 300; exec "$@"', "bash", *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.rstrip().endswith("File too large")
    assert not (tmp_path / "exported").exists()
