"""An export on a disk that refuses."""

import resource
import sys
from pathlib import Path

import pytest

from maple import build_method, save_prompts
from maple.cli import main
from maple.clip import Backbone


# A method of trained classes has no graph of the text tower, which takes longest to export.
@pytest.mark.parametrize(("form", "method"), [("onnx", "linear_probe"), ("torchscript", "coop"), ("openclip", "coop")])
def test_a_full_disk_is_one_line(
    form: str,
    method: str,
    tiny: Backbone,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    save_prompts(tmp_path / "prompts.safetensors", build_method({"name": method}, tiny, ["cat", "dog"]))
    words = ["export", str(tmp_path / "prompts.safetensors"), "--format", form, "--output", str(tmp_path / "exported")]
    monkeypatch.setattr(sys, "argv", ["maple", *words])
    # Python would keep a part of a compiled module as the whole of it.
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300 * 1024, limits[1]))
    try:
        with pytest.raises(SystemExit) as end:
            main()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    errors = capfd.readouterr().err
    assert end.value.code == 2, errors
    assert "Traceback" not in errors
    assert errors.rstrip().endswith("File too large")
    assert not (tmp_path / "exported").exists()
