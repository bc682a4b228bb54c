"""An export that several modules read: making one takes longer than any test of it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from export_helpers import write_prompts

from maple import load_clip
from maple.clip import Backbone
from maple.clip.backbone_names import ARCHITECTURES
from maple.export import export_run


@pytest.fixture(scope="session")
def tiny() -> Backbone:
    return load_clip("maple-tiny", "random:1")


@pytest.fixture(scope="session")
def shallow() -> Iterator[Backbone]:
    """Two blocks in each tower: torch.onnx takes seconds for each block."""
    config = dict(ARCHITECTURES["maple-tiny"])
    for tower in ("vision_cfg", "text_cfg"):
        config[tower] = {**config[tower], "layers": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ARCHITECTURES, "maple-shallow", config)
        yield load_clip("maple-shallow", "random:1")


@pytest.fixture(scope="session")
def maple_file(tiny: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prompts(tmp_path_factory.mktemp("maple"), tiny, {"name": "maple", "prompt_depth": 3})


@pytest.fixture(scope="session")
def exported(maple_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of `maple_file` with zero-shot CLIP; tests that change it change a copy."""
    folder = tmp_path_factory.mktemp("exports") / "maple"
    written = export_run(maple_file, folder, zero_shot=True)
    assert written.difference < 1e-4
    return folder
