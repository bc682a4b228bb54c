"""A run folder on the packaged tiny CLIP's random weights, and pictures."""

import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from maple import build_method, load_clip, save_prompts
from maple.clip import Backbone

sys.path.append(str(Path(__file__).parent.parent / "methods"))

NAMES = ("red thing", "green thing", "blue thing")


@pytest.fixture(scope="session")
def tiny() -> Backbone:
    return load_clip("maple-tiny", "random:1")


@pytest.fixture
def run(tiny: Backbone, tmp_path: Path) -> Path:
    """What `maple explain` needs of a run folder."""
    folder = tmp_path / "run"
    folder.mkdir()
    generator = torch.Generator().manual_seed(3)
    method = build_method({"name": "maple", "prompt_depth": 2}, tiny, NAMES, generator=generator)
    save_prompts(folder / "prompts.safetensors", method, {"dataset": "colours"})
    return folder


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Two pictures, and one that is broken."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, colour in (("a", (200, 30, 30)), ("b b", (30, 30, 200))):
        image = Image.new("RGB", (50, 40), (230, 230, 230))
        image.paste(colour, (5, 5, 25, 25))
        image.save(folder / f"{name}.png")
    (folder / "c.png").write_bytes((folder / "a.png").read_bytes()[:60])
    return folder
