"""Shared parts of the benchmarks: alternating measurements, the machine's rate, class names, result files."""

import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from maple import files
from maple.clip.cpu_linear import frozen_linear
from maple.data import load_dataset

GROUPS = ("food", "animals", "objects", "places", "activities", "people", "symbols", "flags")


def class_names(count: int) -> list[str]:
    """Names of emoji, of one to nine words, group by group, like real lists of class names."""
    return list(_emoji_names()[:count])


@cache
def _emoji_names() -> tuple[str, ...]:
    names = (name for group in GROUPS for name in load_dataset(f"emoji-{group}", Path()).class_names)
    return tuple(dict.fromkeys(names))


def alternate(
    works: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, Any]:
    """Run all works in turn, after one warm-up each: median seconds, and the ratio to the first work in each round."""
    for work in works.values():
        work()
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            start = clock()
            work()
            seconds[name].append(clock() - start)
    first = next(iter(works))
    ratios = {
        name: [other / base for base, other in zip(seconds[first], values, strict=True)]
        for name, values in seconds.items()
        if name != first
    }
    return {
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "ratio": {name: statistics.median(values) for name, values in ratios.items()},
        "ratio_range": {name: [min(values), max(values)] for name, values in ratios.items()},
        "rounds": rounds,
    }


def product_rates(
    dtype: torch.dtype, size: int = 4096, rounds: int = 3, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Operations per second of a large matrix product, the best of `rounds`, with PyTorch's product and with ours.

    The faster one is the limit of the machine.
    """
    left, right = (torch.randn(size, size).to(dtype) for _ in range(2))
    rates = {}
    for name, product in (("PyTorch's product", nn.functional.linear), ("ours", frozen_linear)):
        product(left, right)
        seconds = []
        for _ in range(rounds):
            start = clock()
            product(left, right)
            seconds.append(clock() - start)
        rates[name] = 2 * size**3 / min(seconds)
    return rates


def machine() -> dict[str, Any]:
    """The facts about the machine that a number depends on."""
    model = [line for line in _cpuinfo() if line.startswith("model name")]
    flags = next((line.split() for line in _cpuinfo() if line.startswith("flags")), [])
    return {
        "date": date.today().isoformat(),
        "platform": platform.platform(),
        "cpu": model[0].split(":", 1)[1].strip() if model else platform.processor(),
        "features": [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def write(folder: Path | None, name: str, settings: dict[str, Any], results: Any, *, announce: bool = True) -> None:
    """Write `name`.json with the settings and the machine, where a folder is given; say so if it is to be announced."""
    if folder is not None:
        report = {"settings": {key: str(value) for key, value in settings.items()}, "machine": machine()}
        files.write_json(folder / f"{name}.json", json.loads(json.dumps({**report, "results": results})))
        if announce:
            print(f"written: {folder / name}.json")


def integers(text: str) -> Sequence[int]:
    """Parse whole numbers with commas between them, for a command line."""
    return [int(part) for part in text.split(",") if part]
