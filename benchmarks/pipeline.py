"""Measure image input: transformed images per second, and how long an evaluation waits for them.

Usage: python -m benchmarks.pipeline [--folder FOLDER] [--images 200] [--backbone maple-small] [--device cpu]
                                     [--rounds 5] [--output FOLDER]
Without --folder it draws images of its own (JPEG, about 500 x 375). Compares reading in threads, ahead or while nothing
is encoded, with reading in the caller's thread, in alternation in one process; prints medians and ratios; writes JSON.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks import common
from maple.clip import load_clip
from maple.data import Batch, EvalTransform, ImageStore, Item, TrainTransform, eval_batches
from maple.data.batches import view_batches
from maple.data.folders.listing import walk_files
from maple.data.images.prefetch import overlaps, reading_threads
from maple.evaluation import predict
from maple.methods import Method, build_method

Timed = dict[str, float]


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="images to read (any depth)")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--backbone", default="maple-small")
    parser.add_argument("--pretrained")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    backbone = load_clip(arguments.backbone, arguments.pretrained, device=device)
    method = build_method({"name": "zero_shot"}, backbone, [f"class {number}" for number in range(10)])
    with tempfile.TemporaryDirectory() as drawn:
        folder = arguments.folder or draw(Path(drawn), arguments.images)
        paths = [
            str(path.relative_to(folder)) for path in walk_files(folder) if path.suffix.lower() in (".jpg", ".png")
        ]
        items = [Item(path, 0, "class 0") for path in paths[: arguments.images]]
        if not items:
            raise SystemExit(f"{folder} contains no .jpg or .png files")
        views = views_per_second(method, items, folder, arguments.batch, arguments.rounds)
        waiting = evaluation(method, items, folder, arguments.batch, arguments.rounds)
    settings = {key: value for key, value in vars(arguments).items() if key != "output"}
    about = {"images": len(items), "cores": cores(), "device": name_of(device)}
    common.write(arguments.output, "pipeline", settings, {**about, "views": views, "evaluation": waiting})


def alternate(ours: Callable[[], object], plain: Callable[[], object], rounds: int) -> Timed:
    """Run both in turn: median seconds, and how many times as long the plain way takes."""
    timed = common.alternate({"ours": ours, "plain": plain}, rounds)
    low, high = timed["ratio_range"]["plain"]
    return {**timed["seconds"], "ratio": timed["ratio"]["plain"], "ratio_min": low, "ratio_max": high}


def views_per_second(method: Method, items: list[Item], folder: Path, batch: int, rounds: int) -> dict[str, Timed]:
    """Transforms of decoded images, in threads ("ours") and in the caller's ("plain"), in seconds."""
    seen = method.backbone.preprocessing
    store = ImageStore(folder)
    threads = reading_threads(None)
    results = {}
    for name, transform in (
        ("random crops", TrainTransform(seen.size, seen.mean, seen.std, interpolation=seen.interpolation)),
        ("central views", EvalTransform(seen.size, seen.mean, seen.std, seen.interpolation)),
    ):
        made = partial(view_batches, items, store, transform, view=0, seed=0, batch_size=batch)
        exhaust(made(num_workers=threads))  # decodes the images
        timed = alternate(lambda m=made: exhaust(m(num_workers=threads)), lambda m=made: exhaust(m()), rounds)
        results[name] = timed | {"images_per_second": len(items) / timed["ours"]}
        print(
            f"{name}, {seen.size} pixels: one thread {len(items) / timed['plain']:.0f} images/s, {threads} threads "
            f"{len(items) / timed['ours']:.0f} images/s (medians), {timed['ratio']:.2f}x "
            f"[{timed['ratio_min']:.2f}, {timed['ratio_max']:.2f}]"
        )
    return results


def exhaust(batches: Iterator[Batch]) -> None:
    """Make every batch."""
    for _ in batches:
        pass


def evaluation(method: Method, items: list[Item], folder: Path, batch: int, rounds: int) -> dict[str, object]:
    """Evaluate files as `maple evaluate` does, and in the other ways: seconds, ratios, shares spent on waiting."""
    device = method.backbone.device
    seen = method.backbone.preprocessing
    transform = EvalTransform(seen.size, seen.mean, seen.std, seen.interpolation)
    threads = reading_threads(None)
    names = {False: f"{threads} threads, batch by batch", True: f"{threads} threads, ahead"}
    ours = overlaps(device.type, threads)  # as `maple evaluate` does
    ways = {names[overlap]: (threads, overlap) for overlap in (ours, not ours)}
    ways["the caller's thread"] = (0, True)
    shares: dict[str, list[float]] = {name: [] for name in ways}

    def run(name: str) -> None:
        workers, overlap = ways[name]
        loader = eval_batches(items, folder, transform, batch_size=batch, num_workers=workers, overlap=overlap)
        batches = Waiting(loader)
        start = time.perf_counter()
        predict(method, batches)
        synchronise(device)
        shares[name].append(batches.seconds / (time.perf_counter() - start))

    timed = common.alternate({name: partial(run, name) for name in ways}, rounds)
    waited = {name: float(np.median(values[1:])) for name, values in shares.items()}
    for name, seconds in timed["seconds"].items():
        ratio = ""
        if name in timed["ratio"]:
            low, high = timed["ratio_range"][name]
            ratio = f"; the first is {timed['ratio'][name]:.2f}x as fast [{low:.2f}, {high:.2f}]"
        print(
            f"evaluation, {name}: {len(items) / seconds:.1f} images/s, {waited[name]:.0%} of it waiting for images"
            f"{ratio}"
        )
    return {**timed, "waiting": waited}


class Waiting:
    """Batches, and the seconds that their consumer waited for them."""

    def __init__(self, batches: Iterable[Batch]) -> None:
        self.seconds = 0.0
        self._batches = iter(batches)

    def __iter__(self) -> Iterator[Batch]:
        """Return this iterator."""
        return self

    def __next__(self) -> Batch:
        """Return the next batch."""
        start = time.perf_counter()
        try:
            return next(self._batches)
        finally:
            self.seconds += time.perf_counter() - start


def synchronise(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def cores() -> int | None:
    """The number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def name_of(device: torch.device) -> str:
    """The name of the device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def draw(folder: Path, count: int) -> Path:
    """Write `count` JPEG files of smooth noise, about as large and as hard to decode as photographs."""
    generator = np.random.default_rng(0)
    for number in range(count):
        width, height = (int(side) for side in generator.integers((400, 300), (600, 450)))
        coarse = Image.fromarray(generator.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8))
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(folder / f"{number:04}.jpg", quality=90)
    return folder


if __name__ == "__main__":
    main()
