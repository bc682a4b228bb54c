"""Images per second of an exported image tower on onnxruntime and on PyTorch, in alternation in one run.

    taskset -c 0 python benchmarks/export.py                      # maple-small and ViT-B-16, one thread

MaPLe before training, with random weights where none are packaged; class embeddings are computed beforehand on both
sides.
Equality is checked before anything is timed: `export_run` refuses a float32 export that differs.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

CLASSES = tuple(f"thing number {number}" for number in range(50))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", default="maple-small,ViT-B-16")
    parser.add_argument("--batches", default="1,32")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    import torch

    torch.set_num_threads(1)  # the waiting threads of one library disturb the other
    rows = []
    for name in options.backbones.split(","):
        rows += measure(name, [int(batch) for batch in options.batches.split(",")], options.repeats)
    for row in rows:
        kept = f"{row['megabytes']:7.1f} MB  largest difference of logits {row['difference']:.2g}"
        rate = f"{row['images_per_second']:8.1f} images/s  {row['ratio']:.2f} of PyTorch"
        print(f"{row['backbone']:>12}  batch {row['batch']:>3}  {row['what']:<12} {rate}  {kept}")
    if options.json:
        machine = {"processor": platform.processor(), "cores": len(os.sched_getaffinity(0)), "threads": 1}
        options.json.write_text(json.dumps({"machine": machine, "torch": torch.__version__, "rows": rows}, indent=1))


def measure(name: str, batches: list[int], repeats: int) -> list[dict[str, object]]:
    import numpy as np

    from maple import build_method, load_clip, save_prompts
    from maple.export import export_run
    from maple.inference import TorchPredictor
    from maple.inference.onnx_predictor import OnnxPredictor

    backbone = load_clip(name, None if name == "maple-small" else "random")
    method = build_method({"name": "maple", "prompt_depth": min(9, backbone.text.depth)}, backbone, CLASSES)
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder, "prompts.safetensors")
        save_prompts(prompts, method, {})
        kinds = {"onnx-float32": False, "onnx-int8": True}
        exports = {kind: export_run(prompts, Path(folder, kind), int8=int8) for kind, int8 in kinds.items()}
        predictors = {
            "PyTorch": TorchPredictor(method),
            **{kind: OnnxPredictor.load(export.folder) for kind, export in exports.items()},
        }
        size = backbone.preprocessing.size
        weights = 4e-6 * sum(value.numel() for value in backbone.model.visual.parameters())
        for batch in batches:
            views = np.random.default_rng(0).standard_normal((batch, 3, size, size)).astype(np.float32)
            classes = {kind: predictor.encode_class_names(CLASSES) for kind, predictor in predictors.items()}

            def run(kind: str, views: "np.ndarray" = views, classes: dict = classes) -> None:
                predictors[kind].probabilities(predictors[kind].encode_images(views), classes[kind])

            seconds = in_alternation({kind: lambda kind=kind: run(kind) for kind in predictors}, repeats)
            for kind, value in seconds.items():
                export = exports.get(kind)
                rows.append(
                    {
                        "backbone": name,
                        "batch": batch,
                        "what": kind,
                        "images_per_second": batch / value,
                        "ratio": seconds["PyTorch"] / value,
                        "megabytes": weights if export is None else (export.folder / "image.onnx").stat().st_size / 1e6,
                        "difference": 0.0 if export is None else export.difference,
                    }
                )
    return rows


def in_alternation(works: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """The median seconds of each work, measured in turns after one that is not counted."""
    times: dict[str, list[float]] = {kind: [] for kind in works}
    for turn in range(repeats + 1):
        for kind, work in works.items():
            start = time.perf_counter()
            work()
            if turn:
                times[kind].append(time.perf_counter() - start)
    return {kind: statistics.median(values) for kind, values in times.items()}


if __name__ == "__main__":
    main()
