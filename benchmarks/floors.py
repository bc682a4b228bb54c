"""Compare maple-clip with the plain way at ViT-B/16 size, in alternation in one process.

Usage: python -m benchmarks.floors [--only train-50,train-50-bf16,...] [--rounds 3] [--output FOLDER]
Checks that both ways agree before it times anything. The plain way runs in float32; for the works in bfloat16 it is
also timed in bfloat16, and both ratios are given. For training, the share that the step reaches of the rate of a large
matrix product, measured in the same run, is printed too, useful operations only: of PyTorch's own product, and of the
one that is used here (maple.clip.cpu_linear), which is faster on some processors.
"""

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.baseline import PlainCLIPLoRA, PlainCoCoOp, PlainMaPLe
from benchmarks.common import alternate, class_names, product_rates, write
from maple.clip import Backbone, load_clip
from maple.clip.cpu_linear import FLOPS
from maple.methods import Method
from maple.methods.clip_lora import CLIPLoRA, CLIPLoRASettings
from maple.methods.cocoop import CoCoOp, CoCoOpSettings
from maple.methods.maple import MaPLe, MaPLeSettings

_TOLERANCE = {"fp32": 1e-3, "bf16": 0.1}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="ViT-B-16")
    parser.add_argument("--only", help="names of works, with commas")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=200, help="number of images to evaluate, 100 at once")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    clips = {precision: load_clip(arguments.backbone, "random:0", precision=precision) for precision in _TOLERANCE}
    rates = {precision: product_rates(clip.dtype) for precision, clip in clips.items()}
    for precision, by_product in rates.items():
        listed = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in by_product.items())
        print(f"a 4096 x 4096 matrix product in {precision}, billion operations per second: {listed}")
    works: dict[str, Callable[[], dict[str, Any]]] = {
        f"train-{classes}{suffix}": partial(training, clips, rates, precision, classes, 4, arguments.rounds)
        for precision, suffix in (("fp32", ""), ("bf16", "-bf16"))
        for classes in ((50, 100, 200) if precision == "fp32" else (50,))
    }
    for precision, suffix in (("fp32", ""), ("bf16", "-bf16")):
        works[f"evaluate-100{suffix}"] = partial(evaluation, clips, precision, 100, arguments.images, arguments.rounds)
    works["cocoop-100"] = partial(cocoop, clips["fp32"], 100, 2, arguments.rounds)
    works["lora-50"] = partial(lora, clips["fp32"], 50, 4, arguments.rounds)
    chosen = arguments.only.split(",") if arguments.only else list(works)
    if unknown := [name for name in chosen if name not in works]:
        raise SystemExit(f"unknown works: {', '.join(unknown)}; choose from {', '.join(works)}")
    results: dict[str, Any] = {"product_rates": rates}
    for name in chosen:
        results[name] = works[name]()
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


def maple(clip: Backbone, names: list[str]) -> tuple[MaPLe, PlainMaPLe]:
    """MaPLe as published (shallower where the CLIP is), and the same in the plain way."""
    depth = min(9, clip.text.depth, clip.image.depth)
    method = MaPLe(MaPLeSettings(prompt_depth=depth), clip, names, torch.Generator().manual_seed(0))
    return method, PlainMaPLe(method, clip.tokenize([f"a photo of a {name}." for name in names]))


def noise_images(clip: Backbone, count: int) -> Tensor:
    """Random images [count, 3, R, R]."""
    size = clip.preprocessing.size
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def training(
    clips: Mapping[str, Backbone],
    rates: Mapping[str, Mapping[str, float]],
    precision: str,
    classes: int,
    batch: int,
    rounds: int,
) -> dict[str, Any]:
    """Compute the loss and gradients of one MaPLe step."""
    names = class_names(classes)
    method, plain = maple(clips[precision], names)
    reference, reference_plain = maple(clips["fp32"], names)
    images, labels = noise_images(clips[precision], batch), torch.arange(batch) % classes
    ways: dict[str, Callable[[], object]] = {
        "ours": lambda: step(method, method.loss(images, labels)[0]),
        "plain fp32": lambda: step(reference, reference_plain.loss(images, labels)),
    }
    if precision != "fp32":
        ways[f"plain {precision}"] = lambda: step(method, plain.loss(images, labels))
    gradients = step(method, method.loss(images, labels)[0])
    expected = step(reference, reference_plain.loss(images, labels))
    difference = agree(gradients, expected, precision)
    with FlopCounterMode(display=False, custom_mapping=FLOPS) as counter:
        ways["ours"]()
    operations = counter.get_total_flops()
    timed = alternate(ways, rounds)
    share = {name: operations / timed["seconds"]["ours"] / rate for name, rate in rates[precision].items()}
    return {**timed, "largest_difference": difference, "operations": operations, "share": share}


def evaluation(clips: Mapping[str, Backbone], precision: str, classes: int, count: int, rounds: int) -> dict[str, Any]:
    """Compute the logits of `count` images, 100 at once, class embeddings included."""
    names = class_names(classes)
    method, plain = maple(clips[precision], names)
    _, reference_plain = maple(clips["fp32"], names)
    images = noise_images(clips[precision], 100)
    batches = [images] * max(1, count // 100)

    def ours() -> None:
        method._embeddings = None  # an evaluation begins without any
        for batch in batches:
            method.predict_logits(batch)

    @torch.no_grad()
    def whole(way: PlainMaPLe) -> None:
        for batch in batches:
            way.logits(batch)

    with torch.no_grad():
        few = images[:4]
        difference = agree({"logits": method.predict_logits(few)}, {"logits": reference_plain.logits(few)}, precision)
    ways = {"ours": ours, "plain fp32": lambda: whole(reference_plain)}
    if precision != "fp32":
        ways[f"plain {precision}"] = lambda: whole(plain)
    return {**alternate(ways, rounds), "largest_difference": difference, "images": 100 * len(batches)}


def cocoop(clip: Backbone, classes: int, batch: int, rounds: int) -> dict[str, Any]:
    """Compute CoCoOp's logits, whose text features differ for each image."""
    names = class_names(classes)
    method = CoCoOp(CoCoOpSettings(), clip, names, torch.Generator().manual_seed(0))
    plain = PlainCoCoOp(method, clip.tokenize([f"a photo of a {name}." for name in names]))
    images = noise_images(clip, batch)
    with torch.no_grad():
        difference = agree({"logits": method.predict_logits(images)}, {"logits": plain.logits(images)}, "fp32")
    ways = {"ours": lambda: method.predict_logits(images), "plain fp32": lambda: torch.no_grad()(plain.logits)(images)}
    return {**alternate(ways, rounds), "largest_difference": difference}


def lora(clip: Backbone, classes: int, batch: int, rounds: int) -> dict[str, Any]:
    """Compute the loss and gradients of one step of CLIP-LoRA; they are compared without its dropout, then timed."""
    names = class_names(classes)
    method = CLIPLoRA(CLIPLoRASettings(), clip, names, torch.Generator().manual_seed(0)).eval()
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(0.01)
    plain = PlainCLIPLoRA(method, clip.tokenize([f"a photo of a {name}." for name in names]))
    images, labels = noise_images(clip, batch), torch.arange(batch) % classes
    ways = {
        "ours": lambda: step(method, method.loss(images, labels)[0]),
        "plain fp32": lambda: step(method, plain.loss(images, labels)),
    }
    difference = agree(ways["ours"](), ways["plain fp32"](), "fp32")
    method.train()
    return {**alternate(ways, rounds), "largest_difference": difference}


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
