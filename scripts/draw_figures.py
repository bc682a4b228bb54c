"""Draw the figures of docs/architecture.md from runs on icons-objects/neon with the packaged CLIP.

maple sweep demo --output RUNS
python scripts/draw_figures.py RUNS [--output docs/images]
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt

from maple.data.icons import draw as icon
from maple.explain import Explainer
from maple.explain.heat_maps import draw
from maple.inference import ImageSource, TorchPredictor
from maple.methods import METHODS

DATASET = "icons-objects/neon"
IMAGE = "neon/objects/scissors/21"
MARKERS = "osD^v*PX<>hd"


def runs_below(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Run folders on DATASET, with their settings, by name."""
    runs = [(path.parent, json.loads(path.read_text())) for path in sorted(folder.rglob("config.json"))]
    return [(run, settings) for run, settings in runs if settings["data"]["dataset"] == DATASET]


def lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def draw_training(runs: list[tuple[Path, dict[str, Any]]], path: Path) -> None:
    """Plot loss and accuracy by epoch of MaPLe's runs."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 2.8), layout="constrained")
    for run, settings in runs:
        if settings["method"]["name"] != "maple":
            continue
        history = lines(run / "metrics.jsonl")
        epochs = [line["epoch"] + 1 for line in history]
        left.plot(epochs, [line["loss"] for line in history], "o-", label=f"seed {settings['seed']}")
        right.plot(epochs, [100 * line["logs"]["accuracy"] for line in history], "o-")
    left.set(xlabel="epoch", ylabel="loss, mean of the epoch", xticks=epochs)
    right.set(xlabel="epoch", ylabel="accuracy in training, %", xticks=epochs)
    left.legend(frameon=False)
    figure.savefig(path, dpi=150)


def draw_trade(runs: list[tuple[Path, dict[str, Any]]], path: Path) -> None:
    """Plot base against novel accuracy of every run, with lines of equal harmonic mean."""
    points: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for run, settings in runs:
        rows = {row["classes"]: 100 * row["top1"] for row in lines(run / "rows.jsonl")}
        if {"base", "novel"} <= rows.keys():
            points[settings["method"]["name"]].append((rows["base"], rows["novel"]))
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    names = [name for name in METHODS if name in points]
    for marker, name in zip(MARKERS, names, strict=False):
        axes.plot(*zip(*points[name], strict=True), marker, label=METHODS[name].title, markersize=7, alpha=0.85)
    low, high = axes.get_xlim()
    bottom, top = axes.get_ylim()
    for mean in range(50, 75):
        bases = [low + (high - low) * step / 100 for step in range(101)]
        axes.plot(bases, [mean * base / (2 * base - mean) for base in bases], ":", color="0.6", linewidth=0.8)
        edge = mean * high / (2 * high - mean)
        if bottom < edge < top:
            axes.annotate(f"{mean}", (high, edge), color="0.45", fontsize=8, va="center")
    axes.set(xlabel="base accuracy, %", ylabel="novel accuracy, %  (dotted: equal harmonic mean)")
    axes.set(xlim=(low, high), ylim=(bottom, top))
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.04, 0.5))
    figure.savefig(path, dpi=150)


def draw_map(runs: list[tuple[Path, dict[str, Any]]], path: Path) -> None:
    """Draw the maps of one image under the first run of MaPLe."""
    run = next(run for run, settings in runs if settings["method"]["name"] == "maple")
    explainer = Explainer(TorchPredictor.load(run, zero_shot=True, device="cpu"))
    (explanation,) = explainer.explain([ImageSource(IMAGE, lambda: icon(IMAGE))])
    draw(explanation).save(path)  # type: ignore[arg-type]


def main() -> None:
    """Draw all figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path)
    parser.add_argument("--output", type=Path, default=Path("docs/images"))
    arguments = parser.parse_args()
    mpl.use("agg")
    mpl.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9.5})
    runs = runs_below(arguments.runs)
    if not runs:
        raise SystemExit(f"{arguments.runs} contains no run on {DATASET}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    draw_training(runs, arguments.output / "training.png")
    draw_trade(runs, arguments.output / "trade.png")
    draw_map(runs, arguments.output / "map.png")


if __name__ == "__main__":
    main()
