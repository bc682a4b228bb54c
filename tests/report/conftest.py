"""Run folders made by hand."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_rows import MakeRun, row


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Write a run below tmp_path / "runs": make_run("maple", seed=1, base=0.8, novel=0.6)."""

    def make(
        method: str,
        dataset: str = "pets",
        seed: int = 1,
        *,
        base: float | None = None,
        novel: float | None = None,
        folder: str | None = None,
        names: list[str] | None = None,
        train: dict[str, Any] | None = None,
        rows: list[dict[str, Any]] | None = None,
        kept: dict[str, dict[str, Any]] | None = None,
        **changes: Any,
    ) -> Path:
        place = tmp_path / "runs" / (folder or f"{dataset.replace('/', '-')}_{method}_{seed}")
        place.mkdir(parents=True)
        config = {
            "method": {"name": method},
            "data": {"dataset": dataset},
            "train": {"epochs": 2, "workers": 0, **(train or {})},
            "seed": seed,
        }
        (place / "config.json").write_text(json.dumps(config))
        command = ["/somewhere/maple/__main__.py", "train", "--method", method]
        (place / "environment.json").write_text(
            json.dumps({"command": command, "device": "cpu", "versions": {"a": "1"}})
        )
        (place / "prompts.safetensors").write_bytes(b"")
        if method != "zero_shot":
            epochs = [
                {"epoch": epoch, "lr": 0.1, "loss": 2.0 - epoch, "logs": {"accuracy": 0.5}, "losses": [2.0, 1.0]}
                for epoch in range(2)
            ]
            (place / "metrics.jsonl").write_text("".join(json.dumps(epoch) + "\n" for epoch in epochs))
        found = list(rows or [])
        for classes, top1 in (("base", base), ("novel", novel)):
            if top1 is not None:
                own = names or [f"{classes} one", f"{classes} two"]
                found.append(row(method, dataset, seed, classes, top1, own, **changes))
        for one in found:
            if kept and one["classes"] in kept:
                one["predictions"] = f"predictions/{one['classes']}.npz"
                (place / "predictions").mkdir(exist_ok=True)
                np.savez(place / one["predictions"], **kept[one["classes"]])
        if found:
            (place / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in found))
        return place

    return make


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Where `make_run` puts its runs."""
    return tmp_path / "runs"
