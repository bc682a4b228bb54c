"""Compare maple-clip with the plain way at ViT-B/16 size, in alternation in one process.

Usage: python -m benchmarks.floors [--only train-50,train-50-bf16,...] [--rounds 3] [--cpu-time] [--output FOLDER]
Checks that both ways agree before it times anything. The plain way runs in float32; for the works in bfloat16 it is
also timed in bfloat16, and both ratios are given. For training, the share that the step reaches of the rate of a large
matrix product, measured in the same run, is printed too, useful operations only: of PyTorch's own product, and of the
one that is used here (maple.clip.cpu_linear), which is faster on some processors.
"""

import argparse
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.baseline import Plain, build
from benchmarks.common import alternate, class_names, product_rates, write
from maple.clip import Backbone, load_clip
from maple.clip.cpu_linear import FLOPS
from maple.methods import Method

_TOLERANCE = {"fp32": 1e-3, "bf16": 0.1}

Clips = Mapping[str, Backbone]
Rates = Mapping[str, Mapping[str, float]]
Alternate = Callable[[dict[str, Callable[[], object]]], dict[str, Any]]


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="ViT-B-16-quickgelu")
    parser.add_argument("--only", help="names of works, with commas")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=200, help="number of images to evaluate, 100 at once")
    parser.add_argument("--cpu-time", action="store_true", help="count processor seconds, for shared machines")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    in_turn = partial(alternate, rounds=arguments.rounds, clock=clock)
    works: dict[str, Callable[[], dict[str, Any]]] = {
        f"{name}-{classes}{suffix}": partial(training, in_turn, method, precision, classes, 4)
        for name, method, precision, suffix, sizes in (
            ("train", "maple", "fp32", "", (50, 100, 200)),
            ("train", "maple", "bf16", "-bf16", (50,)),
            ("lora", "clip_lora", "fp32", "", (50,)),
            ("mma", "mma", "fp32", "", (50,)),
            ("mmrl", "mmrl", "fp32", "", (50,)),
        )
        for classes in sizes
    }
    for precision, suffix in (("fp32", ""), ("bf16", "-bf16")):
        works[f"evaluate-100{suffix}"] = partial(evaluation, in_turn, precision, 100, arguments.images)
    works["cocoop-100"] = partial(cocoop, in_turn, "fp32", 100, 2)
    chosen = arguments.only.split(",") if arguments.only else list(works)
    if unknown := [name for name in chosen if name not in works]:
        raise SystemExit(f"unknown works: {', '.join(unknown)}; choose from {', '.join(works)}")
    # Not in vain: some processors take minutes for the product in bfloat16.
    precisions = ["fp32", *(["bf16"] if any(name.endswith("-bf16") for name in chosen) else [])]
    clips = {precision: load_clip(arguments.backbone, "random:0", precision=precision) for precision in precisions}
    rates = {precision: product_rates(clip.dtype, clock=clock) for precision, clip in clips.items()}
    for precision, by_product in rates.items():
        listed = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in by_product.items())
        print(f"a 4096 x 4096 matrix product in {precision}, billion operations per second: {listed}", flush=True)
    results: dict[str, Any] = {"product_rates": rates}
    for name in chosen:
        results[name] = works[name](clips, rates)
        ratios = ", ".join(
            f"{ratio:.2f}x [{low:.2f}, {high:.2f}] of {other}"
            for (other, ratio), (low, high) in zip(
                results[name]["ratio"].items(), results[name]["ratio_range"].values(), strict=True
            )
        )
        shares = results[name].get("share", {})
        listed = ", ".join(
            [ratios, *(f"{100 * share:.0f} % of the rate of {other}" for other, share in shares.items())]
        )
        print(f"{name}: {results[name]['seconds']['ours']:.3f} s, {listed}", flush=True)
    write(arguments.output, "floors", vars(arguments), results)


def noise_images(clip: Backbone, count: int) -> Tensor:
    """Random images [count, 3, R, R]."""
    size = clip.preprocessing.size
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def training(
    in_turn: Alternate, name: str, precision: str, classes: int, batch: int, clips: Clips, rates: Rates
) -> dict[str, Any]:
    """Compute the loss and gradients of one step; they are compared without dropout, then timed with it."""
    names = class_names(classes)
    method, plain = build(name, clips[precision], names)
    reference, reference_plain = build(name, clips["fp32"], names)
    images, labels = noise_images(clips[precision], batch), torch.arange(batch) % classes
    ways: dict[str, Callable[[], Any]] = {
        "ours": lambda: step(method, method.loss(images, labels)[0]),
        "plain fp32": lambda: step(reference, reference_plain.loss(images, labels)),
    }
    if precision != "fp32":
        ways[f"plain {precision}"] = lambda: step(method, plain.loss(images, labels))
    difference = agree(ways["ours"](), ways["plain fp32"](), precision)
    method.train()
    reference.train()
    with FlopCounterMode(display=False, custom_mapping=FLOPS) as counter:
        ways["ours"]()
    operations = counter.get_total_flops()
    timed = in_turn(ways)
    share = {name: operations / timed["seconds"]["ours"] / rate for name, rate in rates[precision].items()}
    return {**timed, "largest_difference": difference, "operations": operations, "share": share}


def evaluation(
    in_turn: Alternate, precision: str, classes: int, count: int, clips: Clips, rates: Rates
) -> dict[str, Any]:
    """Compute the logits of `count` images, 100 at once, class embeddings included."""
    del rates  # of large products: an evaluation waits for memory too
    names = class_names(classes)
    method, plain = build("maple", clips[precision], names)
    _, reference_plain = build("maple", clips["fp32"], names)
    images = noise_images(clips[precision], 100)
    batches = [images] * max(1, count // 100)

    def ours() -> None:
        method._embeddings = None  # an evaluation begins without any
        for batch in batches:
            method.predict_logits(batch)

    @torch.no_grad()
    def whole(way: Plain) -> None:
        for batch in batches:
            way.logits(batch)

    with torch.no_grad():
        few = images[:4]
        difference = agree({"logits": method.predict_logits(few)}, {"logits": reference_plain.logits(few)}, precision)
    ways = {"ours": ours, "plain fp32": lambda: whole(reference_plain)}
    if precision != "fp32":
        ways[f"plain {precision}"] = lambda: whole(plain)
    return {**in_turn(ways), "largest_difference": difference, "images": 100 * len(batches)}


def cocoop(in_turn: Alternate, precision: str, classes: int, batch: int, clips: Clips, rates: Rates) -> dict[str, Any]:
    """Compute CoCoOp's logits, whose text features differ for each image."""
    del rates
    method, plain = build("cocoop", clips[precision], class_names(classes))
    images = noise_images(clips[precision], batch)
    with torch.no_grad():
        difference = agree({"logits": method.predict_logits(images)}, {"logits": plain.logits(images)}, precision)
    ways = {"ours": lambda: method.predict_logits(images), "plain fp32": lambda: torch.no_grad()(plain.logits)(images)}
    return {**in_turn(ways), "largest_difference": difference}


def step(method: Method, loss: Tensor) -> dict[str, Tensor]:
    """Run the backward pass; return the gradients and the loss, and clear the gradients."""
    loss.backward()
    gradients = {name: value.grad for name, value in method.prompt_parameters().items() if value.grad is not None}
    method.zero_grad(set_to_none=True)
    return {**gradients, "loss": loss.detach()}


def agree(ours: Mapping[str, Tensor], plain: Mapping[str, Tensor], precision: str) -> float:
    """The largest difference of two ways, relative to each tensor's largest entry; exit where it is too large."""
    if set(ours) != set(plain):
        raise SystemExit(f"the two ways return different tensors: {sorted(set(ours) ^ set(plain))}")
    worst = max(float((value - plain[name]).abs().max() / plain[name].abs().max()) for name, value in ours.items())
    if not worst <= _TOLERANCE[precision]:
        raise SystemExit(f"the two ways differ by {worst:.1e}; nothing was timed")
    return worst


if __name__ == "__main__":
    main()
