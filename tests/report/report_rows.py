"""Rows and predictions made by hand, with the numbers that a test wants."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from maple.methods import describe_methods

MakeRun = Callable[..., Path]

METHODS = describe_methods()

SETTINGS: dict[str, dict[str, Any]] = {
    "zero_shot": {"templates": ["a photo of a {}."]},
    "coop": {"prompt_length": 4},
    "maple": {"prompt_length": 2, "prompt_depth": 9, "coupling_sharing": "per_layer"},
}
TINY = {"name": "tiny", "pretrained": None, "precision": "fp32", "fingerprint": "f00"}


def row(
    method: str, dataset: str, seed: int, classes: str, top1: float, names: list[str], **changes: Any
) -> dict[str, Any]:
    """A row of rows.jsonl; keyword arguments replace its parts, `settings` and `source` add to them."""
    settings = changes.pop("settings", {})
    source = {"dataset": dataset, "shots": 16, "classes": "base", "class_names": {}, **changes.pop("source", {})}
    return {
        "method": {"name": method, **SETTINGS.get(method, {}), **settings},
        "backbone": TINY,
        "source": source,
        "seed": seed,
        "dataset": dataset,
        "classes": classes,
        "part": "test",
        "class_names": names,
        "items": f"{dataset}-{classes}",
        "images": 10,
        "top1": top1,
        "top5": 1.0,
        "macro_f1": top1,
        "calibration_error": 0.1,
        "per_class": [top1] * len(names),
        "confusion": [[0] * len(names)] * len(names),
        **changes,
    }


def predictions(images: int, classes: int, right: int, *, features: bool = True, seed: int = 0) -> dict[str, Any]:
    """Arrays of a predictions file in which the first `right` images are answered rightly."""
    labels = np.arange(images) % classes
    top = np.stack([(labels + place) % classes for place in range(min(5, classes))], axis=1)
    top[right:] = np.roll(top[right:], 1, axis=1) if classes > 1 else top[right:]
    arrays: dict[str, Any] = {
        "paths": np.array([f"{index}.png" for index in range(images)], dtype=np.str_),
        "labels": labels,
        "top": top,
        "probabilities": np.full(top.shape, 1 / top.shape[1], dtype=np.float32),
        "opened": np.array(["pets", "/root"], dtype=np.str_),
    }
    if features:
        random = np.random.default_rng(seed)
        arrays["feature_items"] = np.arange(images)
        arrays["features"] = random.normal(size=(images, 8)).astype(np.float16)
        arrays["class_features"] = random.normal(size=(classes, 8)).astype(np.float16)
    return arrays
