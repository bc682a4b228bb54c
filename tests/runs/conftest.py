"""Settings of runs small enough for tests."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from feature_tools import write_features
from torch import Tensor

from maple.config import RunSettings, resolve

Make = Callable[..., RunSettings]


@pytest.fixture
def settings_for() -> Make:
    """Settings of a short run on a folder of images; keyword arguments change its training."""

    def make(folder: Path, method: dict[str, Any] | None = None, **train: Any) -> RunSettings:
        layer = {
            "method": method or {"name": "maple", "prompt_depth": 2},
            "backbone": {"name": "maple-tiny", "pretrained": "random"},
            "data": {"dataset": str(folder), "shots": None},
            "train": {"epochs": 2, "batch_size": 4, "lr": 0.01, **train},
        }
        return resolve([layer])

    return make


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Write tensors and metadata into a file of features, and return its path."""

    def write(tensors: dict[str, Tensor], name: str = "some", **metadata: str) -> str:
        return write_features(tmp_path / f"{name}.safetensors", tensors, **metadata)

    return write
