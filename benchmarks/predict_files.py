"""Classify JPEG files as `maple predict` does, and in open_clip's own loop with a DataLoader: the same probabilities.

Usage: python -m benchmarks.predict_files [--images 2000] [--backbones maple-small,ViT-B-16] [--batches 32,100,256]
                                          [--rounds 3] [--processes 1] [--cpu-time] [--output FOLDER]
Draws JPEG files of about 500 x 375 pixels. Compares the loops in one process ("ours", "plain"), and whole processes
from their start to the file of predictions, in alternation. The plain loop uses open_clip's transform, two worker
processes, `encode_image` and softmax over the class texts, with the batch size that is the fastest for it. The weights
are random where none are packaged. `--cpu-time` counts seconds of the processor, workers included, for machines that
are shared. Writes JSON.
"""

import argparse
import csv
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from PIL import Image
from torch.utils.data import DataLoader

from benchmarks import common
from benchmarks.pipeline import draw
from maple import build_method, load_clip, save_prompts
from maple.data.images.prefetch import reading_threads
from maple.export import export_run
from maple.inference import TorchPredictor, find_images

WORKERS = 2
NAMES = common.class_names(50)


def main() -> None:
    """Measure, print and write; exit if the two ways differ."""
    if sys.argv[1:2] == ["plain"]:
        plain_process(Path(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]), int(sys.argv[5]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--backbones", default="maple-small,ViT-B-16")
    parser.add_argument("--batches", type=common.integers, default=(32, 100, 256), help="for the plain loop to choose")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=1, help="rounds of whole processes; 0 for none")
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    clock = processor_seconds if arguments.cpu_time else time.perf_counter
    results = {}
    for name in arguments.backbones.split(","):
        with tempfile.TemporaryDirectory() as temporary:
            results[name] = measure(name, Path(temporary), arguments, clock)
    settings = {key: value for key, value in vars(arguments).items() if key != "output"}
    common.write(arguments.output, "predict-files", settings, results)


def measure(name: str, folder: Path, arguments: argparse.Namespace, clock: Callable[[], float]) -> dict[str, Any]:
    """Seconds of both ways, in a loop and as whole processes, of one backbone."""
    images, clip, prompts = folder / "images", folder / "clip", folder / "prompts.safetensors"
    images.mkdir()
    draw(images, arguments.images)
    packaged = name.startswith("maple-small")
    zero_shot = {"name": "zero_shot", "templates": ["a photo of a {}."]}
    save_prompts(prompts, build_method(zero_shot, load_clip(name, None if packaged else "random"), NAMES), {})
    # The CLIP as a folder that both load.
    export_run(prompts, clip, "openclip")
    method = build_method(zero_shot, load_clip(str(clip)), NAMES)
    save_prompts(prompts, method, {})
    predictor = TorchPredictor(method)
    model, transform, class_features = plain_clip(clip)

    def ours() -> np.ndarray:
        # As `maple predict` calls it.
        results = predictor.stream(find_images([str(images)]), top=len(NAMES), workers=reading_threads(None))
        rows = [{best.name: best.probability for best in result.best} for result in results]
        return np.array([[row[class_name] for class_name in NAMES] for row in rows])

    files = sorted(images.iterdir())
    plain = partial(plain_loop, model, transform, class_features)
    few = files[: max(arguments.batches)]
    seconds = {batch: timed(lambda batch=batch: plain(few, batch), clock) for batch in arguments.batches}
    best = min(seconds, key=seconds.__getitem__)
    difference = float(np.abs(ours() - plain(files, best)).max())
    if not difference < 1e-4:
        raise SystemExit(f"{name}: the two ways differ by {difference:.2g} in probabilities")
    loop = common.alternate({"ours": ours, "plain": lambda: plain(files, best)}, arguments.rounds, clock)
    result = {"largest_difference": difference, "batch of the plain loop": best, "loop": loop}
    report(name, f"loop over {len(files)} images", loop)
    if arguments.processes:
        result["process"] = processes(images, clip, prompts, folder, best, arguments.processes, clock)
        report(name, "whole process", result["process"])
    return result


def report(name: str, work: str, measured: dict[str, Any]) -> None:
    """Print the seconds and the ratio of a comparison."""
    (low, high), seconds = measured["ratio_range"]["plain"], measured["seconds"]
    ratio = f"{measured['ratio']['plain']:.2f}x [{low:.2f}, {high:.2f}]"
    print(f"{name}, {work}: ours {seconds['ours']:.1f} s, plain {seconds['plain']:.1f} s, {ratio}", flush=True)


def processes(
    images: Path, clip: Path, prompts: Path, folder: Path, batch: int, rounds: int, clock: Callable[[], float]
) -> dict[str, Any]:
    """Seconds of whole processes, each of which writes a file of predictions."""
    written = {"ours": folder / "ours.csv", "plain": folder / "plain.csv"}
    commands = {
        "ours": ["-m", "maple", "predict", prompts, images, "--output", written["ours"], "--trust-backbone"],
        "plain": ["-m", "benchmarks.predict_files", "plain", clip, images, written["plain"], batch],
    }

    def run(way: str) -> None:
        written[way].unlink(missing_ok=True)
        subprocess.run([sys.executable, *map(str, commands[way])], check=True)

    measured = common.alternate({way: partial(run, way) for way in commands}, rounds, clock)
    best = {}
    for way, path in written.items():
        with path.open(newline="") as file:
            best[way] = {row["source"]: row["class_1"] for row in csv.DictReader(file)}
    # Of equal probabilities but for rounding, either may come first.
    measured["same class"] = sum(best["ours"][key] == best["plain"][key] for key in best["plain"]) / len(best["plain"])
    return measured


def plain_clip(folder: Path) -> tuple[Any, Any, torch.Tensor]:
    """open_clip's model and transform of a folder, and the unit features of the class texts [C, D], times the scale."""
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    model.eval()
    with torch.inference_mode():
        texts = model.encode_text(tokenizer([f"a photo of a {name}." for name in NAMES]), normalize=True)
        return model, transform, model.logit_scale.exp() * texts


class Files(torch.utils.data.Dataset):
    """Transformed images of files."""

    def __init__(self, files: list[Path], transform: Callable[[Image.Image], torch.Tensor]) -> None:
        self._files, self._transform = files, transform

    def __len__(self) -> int:
        """The number of files."""
        return len(self._files)

    def __getitem__(self, index: int) -> torch.Tensor:
        """One image [3, R, R]."""
        with Image.open(self._files[index]) as image:
            return self._transform(image)


def plain_loop(model: Any, transform: Any, class_features: torch.Tensor, files: list[Path], batch: int) -> np.ndarray:
    """Probabilities [n, C], as open_clip's documentation computes them."""
    parts = []
    with torch.inference_mode():
        for images in DataLoader(Files(files, transform), batch_size=batch, num_workers=WORKERS):
            parts.append((model.encode_image(images, normalize=True) @ class_features.T).softmax(dim=-1))
    return torch.cat(parts).numpy()


def plain_process(clip: Path, images: Path, output: Path, batch: int) -> None:
    """The plain loop, from the files of the CLIP to a table of the five best classes."""
    files = sorted(images.iterdir())
    probabilities = plain_loop(*plain_clip(clip), files, batch)
    with output.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["source", *(f"{part}_{rank}" for rank in range(1, 6) for part in ("class", "probability"))])
        for path, row in zip(files, probabilities, strict=True):
            order = np.argsort(-row, kind="stable")[:5]
            writer.writerow([path, *(value for index in order for value in (NAMES[index], row[index]))])


def timed(work: Callable[[], object], clock: Callable[[], float]) -> float:
    """Seconds of a work."""
    start = clock()
    work()
    return clock() - start


def processor_seconds() -> float:
    """Seconds of the processor that this process and its finished children have used."""
    return sum(os.times()[:4])


if __name__ == "__main__":
    main()
