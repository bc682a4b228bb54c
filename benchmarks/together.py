"""Three seeds of MaPLe trained side by side against one after the other, in alternation, in one process.

Usage: python -m benchmarks.together [--seeds 3] [--batch 4] [--rounds 5] [--only small,vit] [--output FOLDER]
Two cases: the packaged CLIP with 64 classes, and a ViT-B/16 of random weights with 50. Checks that both ways give
the same prompts, momenta and losses before it times anything; prints medians and ratios; writes JSON.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import common
from maple.clip import Backbone, load_clip
from maple.config import TrainSettings
from maple.data import Batch
from maple.methods import build_method
from maple.train import Trainer, run_epochs

CASES = {"small": ("maple-small", None, 64, 3), "vit": ("ViT-B-16", "random:0", 50, 9)}
"""Backbone, its weights, classes, and prompt depth."""
TOLERANCE = {"fp32": 1e-3, "bf16": 0.1}


@dataclass(frozen=True)
class Work:
    """Trainers, the batches of each, and where they compute."""

    trainers: list[Trainer]
    batches: list[list[tuple[Batch, int]]]
    device: torch.device

    def side_by_side(self) -> None:
        """Train one epoch of all, with common passes."""
        run_epochs([(t, batches, lambda _: None) for t, batches in zip(self.trainers, self.batches, strict=True)])
        self._wait()

    def in_turn(self) -> None:
        """Train one epoch of each."""
        for trainer, batches in zip(self.trainers, self.batches, strict=True):
            trainer.run_epoch(batches)
        self._wait()

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="of each run in a round")
    parser.add_argument("--only", default=",".join(CASES))
    parser.add_argument("--precision", default="fp32", choices=TOLERANCE)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cpu-time", action="store_true", help="count processor seconds, for shared machines")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    cases = arguments.only.split(",")
    if unknown := [case for case in cases if case not in CASES]:
        raise SystemExit(f"unknown cases: {', '.join(unknown)}; choose from {', '.join(CASES)}")
    results = {case: measure(case, arguments) for case in cases}
    common.write(arguments.output, "together", vars(arguments), results)


def measure(case: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Time the steps of all runs, both ways; return seconds and ratio."""
    name, pretrained, classes, depth = CASES[case]
    backbone = load_clip(name, pretrained, precision=arguments.precision, device=arguments.device)

    def work() -> Work:
        return make(backbone, classes, depth, range(1, arguments.seeds + 1), arguments.batch, arguments.steps)

    difference = check(work(), work(), TOLERANCE[arguments.precision])
    timed = common.alternate(
        {"together": work().side_by_side, "in turn": work().in_turn},
        arguments.rounds,
        time.process_time if arguments.cpu_time else time.perf_counter,
    )
    per_step = {way: seconds / arguments.steps for way, seconds in timed["seconds"].items()}
    low, high = timed["ratio_range"]["in turn"]
    print(
        f"{name}, {classes} classes, batch {arguments.batch}, a step of each of {arguments.seeds} runs: "
        f"together {per_step['together']:.3f} s, in turn {per_step['in turn']:.3f} s (medians), "
        f"{timed['ratio']['in turn']:.2f}x [{low:.2f}, {high:.2f}]; largest difference {difference:.1e}"
    )
    return {**timed, "largest_difference": difference}


def make(backbone: Backbone, classes: int, depth: int, seeds: Sequence[int], batch: int, steps: int) -> Work:
    """Make a run of MaPLe for each seed, on noise, always in the warm-up: every round has the same rate."""
    names, size = common.class_names(classes), backbone.preprocessing.size
    settings = TrainSettings(epochs=10_000, warmup_epochs=10_000, warmup_lr=1e-3)
    trainers, batches = [], []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        method = build_method({"name": "maple", "prompt_depth": depth}, backbone, names, generator=generator)
        trainers.append(Trainer(method, settings))
        labels = torch.arange(batch) % classes
        images = [torch.randn(batch, 3, size, size, generator=generator) for _ in range(steps)]
        batches.append([(Batch(part, labels), batch) for part in images])
    return Work(trainers, batches, backbone.device)


def check(together: Work, alone: Work, tolerance: float) -> float:
    """The largest relative difference of prompts, momenta and losses after an epoch; exit where it is too large.

    Prompts and momenta are compared by their norms, tensor by tensor.
    """
    together.side_by_side()
    alone.in_turn()
    worst = 0.0
    for trainer, reference in zip(together.trainers, alone.trainers, strict=True):
        (tensors, _), (expected, _) = trainer.state(), reference.state()
        for name, value in expected.items():
            worst = max(worst, float((tensors[name] - value).norm() / value.norm()))
        for loss, expected_loss in zip(trainer.history[-1].losses, reference.history[-1].losses, strict=True):
            worst = max(worst, abs(loss - expected_loss) / abs(expected_loss))
    if not worst <= tolerance:
        raise SystemExit(f"the two ways differ by {worst:.1e}; nothing was timed")
    return worst


if __name__ == "__main__":
    main()
