"""One command that checks and times maple-clip on a GPU, without a network: agreement first, then the plain way.

Usage: python -m benchmarks.gpu [--minutes 8] [--only training,...] [--output FOLDER]
       python -m benchmarks.gpu --device cpu --small    # the same code at small sizes, without a GPU

Every method is computed on the GPU in float32 (with PyTorch's default of TF32 in convolutions, and without), bfloat16
and float16, and compared with the CPU's float32. Then, in alternation with the plain way of `benchmarks.baseline`:
training steps; three and eight seeds in one pass; evaluation and prediction of JPEG files; `torch.compile` and CUDA
graphs around the blocks, with what compiling and capturing cost. Peak memory, and the share of the rate of a large
matrix product, are of the same run. Works are in the order of their importance; what does not fit into the minutes is
written as skipped, and a work that fails is written with its error. The file has the card's name and the date, and is
written after each work. Ends with status 1 if something did not agree, or its agreement failed.

Needs PyTorch 2.11 or newer with CUDA, and this package's dependencies; weights are random, or packaged. What a machine
without a network lacks travels as wheels: on one that has a network, `pip download --no-deps --only-binary=:all: --dest
wheels` with the other's `--python-version` and `--platform`, of what is missing there (usually open_clip_torch, ftfy,
wcwidth, pydantic, pydantic_core, annotated_types, typing_inspection and tomli_w); there, `pip install --no-index
--no-deps wheels/*.whl`, and run this from the root of the repository with PYTHONPATH=src.
"""

import argparse
import re
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import gpu_works as works
from benchmarks.baseline import PLAIN
from benchmarks.common import write
from benchmarks.gpu_works import Sizes
from benchmarks.pipeline import name_of

SMALL = {
    "batches": (2, 2),
    "classes": (3, 3),
    "seeds": (2, 2),
    "seconds": 0.0,
    "images": 4,
    "files": 2,
    "workers": 0,
    "compiler": "eager",
    "precisions": ("fp32", "bf16"),
    "backbones": ("maple-tiny",),
}
_VERSIONS = ("torch", "torchvision", "open_clip_torch", "timm", "numpy", "pillow")


class Work(NamedTuple):
    """A part of the check; parts of one kind take about as long as each other."""

    kind: str
    name: str
    run: Callable[[], works.Result]


def main() -> None:
    """Run the works, print, write, and end with 1 if something did not agree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny sizes, one round of each")
    parser.add_argument("--minutes", type=float, default=8.0, help="works that would end later are skipped")
    parser.add_argument("--only", help="kinds of works, with commas")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("PyTorch sees no CUDA device here; --device cpu --small runs the same code at small sizes")
    sizes = Sizes(device=device)
    if arguments.small:
        sizes = replace(sizes, **SMALL)
    rates: dict[str, float | None] = {}
    planned = plan(sizes, rates)
    kinds = list(dict.fromkeys(work.kind for work in planned))
    chosen = arguments.only.split(",") if arguments.only else kinds
    if unknown := [kind for kind in chosen if kind not in kinds]:
        raise SystemExit(f"unknown kinds of works: {', '.join(unknown)}; choose from {', '.join(kinds)}")
    card = name_of(device)
    results: dict[str, Any] = {"device": card, "versions": versions()}
    name = f"gpu-{re.sub(r'[^A-Za-z0-9]+', '-', card).strip('-')}-{date.today().isoformat()}"
    save = partial(write, arguments.output, name, vars(arguments), results)
    disagreeing = run([work for work in planned if work.kind in chosen], sizes, arguments.minutes, results, save)
    if disagreeing:
        sys.exit(f"does not agree: {', '.join(disagreeing)}")


def plan(sizes: Sizes, rates: dict[str, float | None]) -> list[Work]:
    """All works, the most important first; `rates` gets the rates of products when they have been measured."""

    def measure(precision: str) -> works.Result:
        result = works.product_rate(sizes, precision)
        rates[precision] = result["operations_per_second"]
        return result

    def steps(precision: str, batch: int, classes: int, names: tuple[str, ...]) -> list[Work]:
        return [
            Work(
                "training",
                f"training {name} {precision}, batch {batch}, {classes} classes",
                partial(works.training, sizes, name, precision, batch, classes, rates),
            )
            for name in names
        ]

    main, *others = sizes.precisions
    (small_batch, large_batch), (few, many) = sizes.batches, sizes.classes
    planned = [
        *(Work("products", f"product {precision}", partial(measure, precision)) for precision in sizes.precisions),
        *(
            Work("agreement", f"agreement {name}, {backbone}", partial(works.agreement, sizes, name, backbone))
            for backbone in sizes.backbones
            for name in PLAIN
        ),
        *steps(main, small_batch, few, sizes.methods),
        *(
            Work("together", f"together {seeds} seeds", partial(works.several_runs, sizes, main, seeds))
            for seeds in sizes.seeds
        ),
        Work("files", "JPEG files to predictions", partial(works.files_to_predictions, sizes, main)),
        *steps(main, small_batch, many, sizes.methods),
        *steps(main, large_batch, few, sizes.methods),
        *(
            Work("blocks", f"blocks of the {tower} tower", partial(works.block_loop, sizes, main, tower))
            for tower in ("image", "text")
        ),
        *steps(main, large_batch, many, sizes.methods),
        *steps(main, small_batch, few, ("mma", "mmrl")),
        *(work for precision in others for work in steps(precision, small_batch, few, tuple(PLAIN))),
    ]
    return list({work.name: work for work in planned}.values())


def run(
    planned: list[Work], sizes: Sizes, minutes: float, results: dict[str, Any], save: Callable[..., None]
) -> list[str]:
    """Run the works until the minutes are over, into `results`; the names of those that do not agree.

    What was measured is saved after each work, so that a run that is stopped leaves it.
    """
    begun, longest = time.monotonic(), dict[str, float]()
    disagreeing = []
    for work in planned:
        left = 60 * minutes - (time.monotonic() - begun)
        if left < longest.get(work.kind, 0.0) or left <= 0:
            results[work.name] = {"skipped": f"{max(left, 0):.0f} seconds of {minutes:g} minutes were left"}
            print(f"{work.name}: skipped, {results[work.name]['skipped']}", flush=True)
        else:
            start = time.monotonic()
            try:
                result = work.run()
            except Exception as error:  # noqa: BLE001 - a work that fails must not end the others
                result = {"error": works.describe(error), **({"agrees": False} if work.kind == "agreement" else {})}
            works.free_memory(sizes.device)
            taken = time.monotonic() - start
            longest[work.kind] = max(taken, longest.get(work.kind, 0.0))
            results[work.name] = {**result, "taken_seconds": taken}
            if not result.get("agrees", True):
                disagreeing.append(work.name)
            print(f"{work.name}: {summary(result)} ({taken:.1f} s)", flush=True)
        save(announce=work is planned[-1])
    return disagreeing


def summary(result: works.Result) -> str:
    """One line on a result."""
    parts = [] if result.get("agrees", True) else ["DOES NOT AGREE"]
    if "operations_per_second" in result:
        parts.append(f"{result['operations_per_second'] / 1e12:.2f} trillion operations per second")
    for mode in works.MODES:
        if mode in result:
            parts.append(f"{mode} " + "/".join(f"{value:.1e}" for value in result[mode].values()))
    for name, seconds in result.get("seconds", {}).items():
        ratio = f", {result['ratio'][name]:.2f}x" if name in result["ratio"] else ""
        parts.append(f"{name} {1000 * seconds:.1f} ms{ratio}")
    if "share_of_product_rate" in result:
        parts.append(f"{100 * result['share_of_product_rate']:.0f} % of the product's rate")
    parts += [f"{name} cost {seconds:.1f} s" for name, seconds in result.get("cost_seconds", {}).items()]
    parts += [f"{name} failed: {error}" for name, error in result.get("errors", {}).items()]
    return "; ".join([*parts, *([result["error"]] if "error" in result else [])])


def versions() -> dict[str, str | None]:
    """The versions that the numbers depend on; None for a package that is not installed."""
    installed: dict[str, str | None] = {"cuda": torch.version.cuda, "cudnn": str(torch.backends.cudnn.version())}
    for package in _VERSIONS:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            installed[package] = None
    return installed


if __name__ == "__main__":
    main()
