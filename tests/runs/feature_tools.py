"""Features of a few classes that are easily distinguished, files of them, and settings of short runs on these."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from maple.config import RunSettings, resolve

METHODS: dict[str, dict[str, Any]] = {
    "zero_shot": {},
    "taskres": {},
    "clip_adapter": {},
    "linear_probe": {"inverse_regularisation": 1.0},
    "tip_adapter": {"alpha": 1.0, "beta": 5.5},
    "clap": {},
    "lpplusplus": {"epochs": 20, "select_epoch": False},
    "gda": {"alpha": 1.0},
}


def settings_of(dataset: str, method: str, **data: Any) -> RunSettings:
    return resolve(
        [
            {
                "method": {"name": method, **METHODS.get(method, {})},
                "backbone": {"name": "maple-small"},
                "data": {"dataset": dataset, "shots": 4, **data},
                "train": {"epochs": 2, "batch_size": 8, "views": 0},
            }
        ]
    )


def tensors_of(classes: int = 3, rows: int = 4, width: int = 8) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(classes, width, generator=generator)
    labels = torch.arange(classes).repeat(rows)
    noise = torch.randn(2, classes * rows, width, generator=generator) / 4
    return {
        "text": centres + torch.randn(classes, width, generator=generator) / 4,
        "train": centres[labels] + noise[0],
        "train_labels": labels,
        "test": centres[labels] + noise[1],
        "test_labels": labels.to(torch.int16),
    }


def write_features(path: Path, tensors: dict[str, Tensor], **metadata: str) -> str:
    """Write a file of features, and return its path."""
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata=metadata)
    return str(path)
