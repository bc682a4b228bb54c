"""A MaPLe training step and an evaluation batch at ViT-B/16 size: ours against the plain way, in alternation.

Usage: python -m benchmarks.step [--classes 50] [--batch 4] [--rounds 5] [--output FOLDER]
Checks that both ways agree before it times anything; prints medians and their ratio; writes JSON.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.baseline import PlainMaPLe
from maple import files
from maple.clip import load_clip
from maple.methods.maple import MaPLe, MaPLeSettings

Timed = dict[str, float]


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="ViT-B-16")
    parser.add_argument("--classes", type=int, default=50)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    backbone = load_clip(arguments.backbone, "random:0")
    names = [f"class number {number}" for number in range(arguments.classes)]
    generator = torch.Generator().manual_seed(0)
    method = MaPLe(MaPLeSettings(), backbone, names, generator)
    plain = PlainMaPLe(method, backbone.tokenize([f"a photo of a {name}." for name in names]))
    size = backbone.preprocessing.size
    images = torch.randn(arguments.batch, 3, size, size, generator=generator)
    labels = torch.arange(arguments.batch) % len(names)
    difference = check(method, plain, images, labels)
    results = {
        "training step": alternate(
            lambda: train_step(method, method.loss(images, labels)[0]),
            lambda: train_step(method, plain.loss(images, labels)),
            arguments.rounds,
        ),
        "evaluation batch": alternate(
            lambda: method.predict_logits(images), lambda: torch.no_grad()(plain.logits)(images), arguments.rounds
        ),
    }
    for work, timed in results.items():
        print(
            f"{work}: ours {timed['ours']:.3f} s, plain {timed['plain']:.3f} s (medians), {timed['ratio']:.2f}x "
            f"[{timed['ratio_min']:.2f}, {timed['ratio_max']:.2f}]"
        )
    if arguments.output is not None:
        report = {
            "settings": {key: str(value) for key, value in vars(arguments).items() if key != "output"},
            "largest_difference": difference,
            "results": results,
            "machine": {
                "platform": platform.platform(),
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
            },
        }
        files.write_json(arguments.output / "step.json", json.loads(json.dumps(report)))


def train_step(method: MaPLe, loss: Tensor) -> None:
    """Backward, and the gradients thrown away."""
    loss.backward()
    method.zero_grad(set_to_none=True)


def check(method: MaPLe, plain: PlainMaPLe, images: Tensor, labels: Tensor) -> float:
    """The largest relative difference between both ways' logits and gradients; too large a one ends the program."""
    parameters = method.prompt_parameters()
    found = []
    for loss in (lambda: method.loss(images, labels)[0], lambda: plain.loss(images, labels)):
        loss().backward()
        found.append({name: value.grad.clone() for name, value in parameters.items() if value.grad is not None})
        method.zero_grad(set_to_none=True)
    with torch.no_grad():
        found[0]["logits"], found[1]["logits"] = method(images), plain.logits(images)
    worst = max(
        float((ours - found[1][name]).abs().max() / found[1][name].abs().max()) for name, ours in found[0].items()
    )
    print(f"largest relative difference of logits and gradients: {worst:.1e}")
    if worst > 1e-3:
        raise SystemExit("the two ways do not compute the same; nothing was timed")
    return worst


def alternate(ours: Callable[[], object], plain: Callable[[], object], rounds: int) -> Timed:
    """Run both in turn, after one warm-up each; medians in seconds, and the ratio pair by pair."""
    ours()
    plain()
    seconds: dict[str, list[float]] = {"ours": [], "plain": []}
    for _ in range(rounds):
        for name, work in (("ours", ours), ("plain", plain)):
            start = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - start)
    ratios = [b / a for a, b in zip(seconds["ours"], seconds["plain"], strict=True)]
    return {
        **{name: statistics.median(values) for name, values in seconds.items()},
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }


if __name__ == "__main__":
    main()
