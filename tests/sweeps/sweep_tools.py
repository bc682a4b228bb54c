"""Shared by the tests of sweeps."""

import json
from pathlib import Path
from typing import Any

from maple.sweeps import PlannedRun, RunOutcome, SweepProgress, SweepSettings, plan_sweep

SMALL = {
    "backbone": {"name": "maple-tiny", "pretrained": "random"},
    "train": {"epochs": 2, "batch_size": 4, "lr": 0.01},
}


class RecordedProgress(SweepProgress):
    """Keeps what it receives."""

    def __init__(self) -> None:
        self.activities: list[tuple[str, str]] = []
        self.ends: list[str] = []

    def advance(self, name: str, activity: str, done: int, total: int) -> None:
        assert 0 < done <= total
        self.activities.append((name, activity))

    def ended(self, run: PlannedRun, outcome: RunOutcome) -> None:
        assert run.name == outcome.name
        self.ends.append(outcome.status)


def small_sweep(images: Path, **values: Any) -> list[PlannedRun]:
    settings = {"protocol": "base-to-novel", "methods": ["zero_shot", "vpt"], "datasets": [str(images)], "seeds": [1]}
    return plan_sweep(SweepSettings(**{**settings, "shots": [None], "settings": SMALL, **values}))


def rows_below(root: Path) -> dict[str, list[Any]]:
    return {
        path.parent.name: sorted(
            [row["asked"]["classes"], row["top1"], row["confusion"]]
            for row in map(json.loads, path.read_text().splitlines())
        )
        for path in root.glob("*/rows.jsonl")
    }
