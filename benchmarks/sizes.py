"""Measure time and peak memory of a MaPLe training step against its size, each in a new process.

Usage: python -m benchmarks.sizes [--classes 10,50,100,200,500,1000] [--batch 1,4,32,100] [--depth 1,9,12]
                                  [--plain 50,200] [--precision fp32] [--output FOLDER]
Classes are varied at batch 4 and depth 9, batches at 50 classes, depths at both. `--plain` names class counts at which
the plain way runs too. Memory is the peak of the process beyond its memory with the weights loaded; "in total" is the
peak with the weights and everything else.
"""

import argparse
import gc
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.baseline import Plain
from benchmarks.common import class_names, integers, write
from benchmarks.floors import noise_images, step
from maple.clip import load_clip
from maple.methods.maple import MaPLe, MaPLeSettings

_STATUS = Path("/proc/self/status")


def main() -> None:
    """Measure, print and write; with --work, be the process that is measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="ViT-B-16-quickgelu")
    parser.add_argument("--classes", type=integers, default=[10, 50, 100, 200, 500, 1000])
    parser.add_argument("--batch", type=integers, default=[1, 4, 32, 100])
    parser.add_argument("--depth", type=integers, default=[1, 9, 12])
    parser.add_argument("--plain", type=integers, default=[50, 200])
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--text-memory", type=float, help="GiB")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    common = {key: getattr(arguments, key) for key in ("backbone", "precision", "text_memory")}
    if arguments.work:
        print(json.dumps(measure({**common, **json.loads(arguments.work)})))
        return
    works = [{"classes": classes, "batch": 4, "depth": 9} for classes in arguments.classes]
    works += [{"classes": 50, "batch": batch, "depth": 9} for batch in arguments.batch]
    works += [{"classes": 50, "batch": 4, "depth": depth} for depth in arguments.depth]
    works = [{**work, "plain": False} for number, work in enumerate(works) if work not in works[:number]]
    works += [{"classes": classes, "batch": 4, "depth": 9, "plain": True} for classes in arguments.plain]
    results = []
    for work in works:
        results.append({**work, **measure_in_new_process({**common, **work})})
        result, way = results[-1], "plain" if work["plain"] else "ours"
        print(
            f"{way}: {work['classes']} classes, batch {work['batch']}, depth {work['depth']}: "
            f"{result['seconds']:.3f} s, {result['beyond'] / 2**20:.0f} MiB beyond the weights, "
            f"{result['in_all'] / 2**30:.2f} GiB in total",
            flush=True,
        )
    write(arguments.output, f"sizes-{arguments.precision}", vars(arguments), results)


def measure_in_new_process(work: dict[str, Any]) -> dict[str, float]:
    """Measure in a new process, so that the peak is not that of an earlier work."""
    command = [sys.executable, "-m", "benchmarks.sizes", "--work", json.dumps(work)]
    return dict(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]))


def measure(work: dict[str, Any]) -> dict[str, float]:
    """Median seconds of three steps after a first, and peak bytes."""
    clip = load_clip(work["backbone"], "random:0", precision=work["precision"])
    names = class_names(work["classes"])
    settings = MaPLeSettings(prompt_depth=work["depth"])
    method = MaPLe(settings, clip, names, torch.Generator().manual_seed(0))
    method.limit_text_memory(None if work["text_memory"] is None else int(work["text_memory"] * 2**30))
    plain = Plain(method, names)
    images, labels = noise_images(clip, work["batch"]), torch.arange(work["batch"]) % len(names)
    gc.collect()
    before = reset_peak()
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        step(method, plain.loss(images, labels) if work["plain"] else method.loss(images, labels)[0])
        seconds.append(time.perf_counter() - start)
    in_all = held("VmHWM")
    return {"seconds": sorted(seconds[1:])[1], "beyond": in_all - before, "in_all": in_all}


def reset_peak() -> int:
    """Forget the peak until now; bytes held."""
    Path("/proc/self/clear_refs").write_text("5")
    return held("VmRSS")


def held(field: str) -> int:
    """Bytes that the kernel gives for this process: VmRSS now, VmHWM at most."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
