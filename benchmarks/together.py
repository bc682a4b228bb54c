"""Three seeds of MaPLe side by side against one after the other, in alternation, in one process.

Usage: python -m benchmarks.together [--seeds 3] [--batch 4] [--rounds 5] [--cases small,vit] [--output FOLDER]
Two cases: the packaged CLIP with 64 classes of a group of emoji, and a ViT-B/16 of random weights with 50 classes.
Checks that both ways come to the same prompts before it times anything; prints medians of a step and their ratio;
writes JSON.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from maple import files
from maple.clip import Backbone, load_clip
from maple.config import TrainSettings
from maple.data import Batch
from maple.methods import build_method
from maple.train import Trainer, run_epochs

CASES = {"small": ("maple-small", None, 64, 3), "vit": ("ViT-B-16", "random:0", 50, 9)}
"""Backbone, its weights, classes, and prompt depth."""
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Work:
    """Trainers, and the batches of each."""

    trainers: list[Trainer]
    batches: list[list[tuple[Batch, int]]]

    def side_by_side(self) -> None:
        """One epoch of all, their passes made as one."""
        run_epochs([(t, own, lambda _: None) for t, own in zip(self.trainers, self.batches, strict=True)])

    def in_turn(self) -> None:
        """One epoch of each."""
        for trainer, own in zip(self.trainers, self.batches, strict=True):
            trainer.run_epoch(own)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="of each run in a round")
    parser.add_argument("--cases", default="small,vit")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--cpu-time", action="store_true", help="count this process's processor seconds: where others share the cores"
    )
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    results = {case: measure(case, arguments) for case in arguments.cases.split(",")}
    if arguments.output is not None:
        report = {
            "settings": {key: str(value) for key, value in vars(arguments).items() if key != "output"},
            "results": results,
            "machine": {
                "platform": platform.platform(),
                "device": torch.cuda.get_device_name() if arguments.device.startswith("cuda") else "cpu",
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
            },
        }
        files.write_json(arguments.output / "together.json", json.loads(json.dumps(report)))


def measure(case: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds of a step of all runs, both ways, and the ratio pair by pair."""
    name, pretrained, classes, depth = CASES[case]
    backbone = load_clip(name, pretrained, precision=arguments.precision, device=arguments.device)

    def work() -> Work:
        return make(backbone, classes, depth, range(1, arguments.seeds + 1), arguments.batch, arguments.steps)

    difference = check(work(), work(), TOLERANCE if arguments.precision == "fp32" else 0.05)
    beside, alone = work(), work()
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    timed = alternate(beside.side_by_side, alone.in_turn, backbone.device, arguments.rounds, clock)
    per_step = {key: value / (arguments.steps if key in ("together", "in_turn") else 1) for key, value in timed.items()}
    print(
        f"{name}, {classes} classes, batch {arguments.batch}, {arguments.seeds} runs, a step of all: together "
        f"{per_step['together']:.3f} s, in turn {per_step['in_turn']:.3f} s (medians), {per_step['ratio']:.2f}x "
        f"[{per_step['ratio_min']:.2f}, {per_step['ratio_max']:.2f}]; largest difference {difference:.1e}"
    )
    return {**per_step, "largest_difference": difference}


def make(backbone: Backbone, classes: int, depth: int, seeds: Sequence[int], batch: int, steps: int) -> Work:
    """A run of MaPLe's recipe for each seed, on noise."""
    names = [f"class number {number}" for number in range(classes)]
    size, trainers, batches = backbone.preprocessing.size, [], []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        method = build_method({"name": "maple", "prompt_depth": depth}, backbone, names, generator=generator)
        # Epochs enough for any number of rounds, all at the warm-up's rate.
        trainers.append(Trainer(method, TrainSettings(epochs=10_000, warmup_epochs=10_000, warmup_lr=1e-4)))
        labels = torch.arange(batch) % classes
        batches.append(
            [(Batch(torch.randn(batch, 3, size, size, generator=generator), labels), batch) for _ in range(steps)]
        )
    return Work(trainers, batches)


def check(beside: Work, alone: Work, tolerance: float) -> float:
    """The largest relative difference between both ways' prompts and momenta after an epoch; too large ends all."""
    beside.side_by_side()
    alone.in_turn()
    worst = 0.0
    for one, other in zip(beside.trainers, alone.trainers, strict=True):
        found, expected = one.state()[0], other.state()[0]
        for name, value in expected.items():
            worst = max(worst, float((found[name] - value).abs().max() / value.abs().max()))
    if not worst <= tolerance:
        raise SystemExit(f"the two ways do not compute the same ({worst:.1e}); nothing was timed")
    return worst


def alternate(
    together: Callable[[], object],
    in_turn: Callable[[], object],
    device: torch.device,
    rounds: int,
    clock: Callable[[], float],
) -> dict[str, float]:
    """Run both in turn, after one warm-up each; medians in seconds, and the ratio pair by pair."""
    seconds: dict[str, list[float]] = {"together": [], "in_turn": []}
    for round_number in range(rounds + 1):
        for name, work in (("together", together), ("in_turn", in_turn)):
            start = clock()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if round_number:
                seconds[name].append(clock() - start)
    ratios = [b / a for a, b in zip(seconds["together"], seconds["in_turn"], strict=True)]
    return {
        **{name: statistics.median(values) for name, values in seconds.items()},
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }


if __name__ == "__main__":
    main()
