"""Runs of methods on frozen features, one after the other, without and with the cache of features, in one process.

Usage: python -m benchmarks.cached_features --data ROOT [--dataset eurosat] [--backbone maple-small] [--shots 16]
[--methods zero_shot,linear_probe,...] [--output FOLDER]
Three rounds: without the cache; with an empty one; with what the second round has left there. Checks that the prompts,
the rows and the predictions are the same bytes; prints the seconds of each run; writes JSON.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import common
from maple.checkpoint import load_prompts
from maple.config import preset_names, read_preset, resolve
from maple.runs import evaluate_run, finished_prompts, train_run
from maple.runs.spec import cached_backbone

METHODS = "zero_shot,linear_probe,tip_adapter,tip-adapter-f,clip_adapter,taskres"
ROUNDS = ("without", "empty", "filled")


def main() -> None:
    """Measure, compare, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--dataset", default="eurosat")
    parser.add_argument("--backbone", default="maple-small")
    parser.add_argument("--shots", type=int, default=16)
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    methods = options.methods.split(",")
    seconds: dict[str, dict[str, dict[str, float]]] = {}
    contents: dict[str, dict[str, bytes]] = {}
    with tempfile.TemporaryDirectory() as place:
        for name in ROUNDS:
            os.environ["MAPLE_CACHE"] = "off" if name == "without" else f"{place}/cache"
            seconds[name], contents[name] = {}, {}
            for method in methods:
                layer = {
                    "backbone": {"name": options.backbone},
                    "data": {"dataset": options.dataset, "root": options.data, "shots": options.shots},
                }
                protocol = "few-shot" if f"{method}_few-shot" in preset_names() else "base-to-novel"
                settings = resolve([read_preset(f"{method}_{protocol}"), layer, {"data": {"classes": "all"}}])
                backbone = settings.backbone
                # As a sweep does, the backbone is loaded once.
                clip = cached_backbone(backbone.name, backbone.pretrained, backbone.precision, torch.device("cpu"))
                folder = Path(place, name, method)
                start = time.perf_counter()
                train_run(settings, folder, device="cpu", backbone=clip)
                trained = time.perf_counter()
                evaluate_run(folder, method=load_prompts(finished_prompts(folder), clip))
                ended = time.perf_counter()
                seconds[name][method] = {"training": trained - start, "evaluation": ended - trained}
                files = [folder / "prompts.safetensors", folder / "rows.jsonl", *folder.glob("predictions/*.npz")]
                contents[name] |= {f"{method}/{path.name}": path.read_bytes() for path in files}
                print(
                    f"{name:8} {method:14} {trained - start:7.2f} s training, {ended - trained:7.2f} s evaluation",
                    flush=True,
                )
            total = sum(sum(times.values()) for times in seconds[name].values())
            print(f"{name:8} {'all':14} {total:7.2f} s")
        size = sum(path.stat().st_size for path in Path(place, "cache").rglob("*.safetensors"))
    same = contents["without"] == contents["empty"] == contents["filled"]
    print(f"prompts, rows and predictions are {'the same bytes' if same else 'DIFFERENT'}; {size:,} bytes are kept")
    common.write(options.output, "cached_features", vars(options), {"seconds": seconds, "bytes": size, "same": same})


if __name__ == "__main__":
    main()
