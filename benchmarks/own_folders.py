"""Fit folders of images with the choice of a method, and with each method alone: accuracies on held-out images.

Usage: python -m benchmarks.own_folders FOLDER [FOLDER ...] [--seeds 1,2,3] [--backbone maple-small] [--minutes 10]
                                        [--methods zero_shot,taskres] [--work build/own_folders] [--output FOLDER]
All methods of a folder and a seed are tested on the same held-out images. The work folder keeps the runs: what was
interrupted continues. Prints, for each method, its accuracy on each folder (mean over seeds), the mean over all, its
standard error over folders and seeds, and the seconds that a fit took.
"""

import argparse
import time
from collections import defaultdict
from pathlib import Path

import numpy as np

from benchmarks.common import integers, write
from maple import files
from maple.fitting import AUTO, CANDIDATES, SelectionSettings, fit, fit_candidates, fit_settings


def main() -> None:
    """Fit, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", help="folders, FOLDER:DOMAIN, tables, or names of data sets")
    parser.add_argument("--seeds", type=integers, default=[1, 2, 3])
    parser.add_argument("--backbone", default="maple-small")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--methods", type=lambda text: text.split(","), default=list(CANDIDATES))
    parser.add_argument("--work", type=Path, default=Path("build/own_folders"))
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    results = []
    for source in arguments.folders:
        for seed in arguments.seeds:
            layer = {"backbone": {"name": arguments.backbone}, "seed": seed}
            for recipe in [AUTO, *arguments.methods]:
                folder = arguments.work / f"{Path(source).name.replace(':', '-')}_{recipe}_seed{seed}"
                start = time.perf_counter()
                if recipe == AUTO:
                    candidates = fit_candidates(source, arguments.methods, layer=layer)
                    result = fit(candidates, folder, selection=SelectionSettings(minutes=arguments.minutes))
                else:
                    result = fit(fit_settings(source, recipe, layer=layer), folder)
                seconds = time.perf_counter() - start
                if result.was_finished:
                    seconds = files.read_json(folder / "seconds.json", advice="")["seconds"]
                files.write_json(folder / "seconds.json", {"seconds": seconds})
                if result.accuracy is None:
                    raise SystemExit(f"{source}: no images are held out")
                chosen = result.selection.chosen.recipe if result.selection else recipe
                identity = {"folder": Path(source).name, "seed": seed, "method": recipe, "chosen": chosen}
                right, images = result.accuracy.right, result.accuracy.images
                results.append({**identity, "right": right, "images": images, "seconds": seconds})
                accuracy = 100 * result.accuracy.fraction
                print(f"{source}, seed {seed}: {recipe} ({chosen}) {accuracy:.1f} % in {seconds:.0f} s", flush=True)
    _print_table(results)
    write(arguments.output, "own_folders", {**vars(arguments), "work": str(arguments.work)}, results)


def _print_table(results: list[dict[str, object]]) -> None:
    accuracies: dict[str, dict[object, list[float]]] = defaultdict(lambda: defaultdict(list))
    seconds: dict[str, list[float]] = defaultdict(list)
    for row in results:
        method = str(row["method"])
        accuracies[method][row["folder"]].append(100 * float(row["right"]) / float(row["images"]))  # type: ignore[arg-type]
        seconds[method].append(float(row["seconds"]))  # type: ignore[arg-type]
    names = list(dict.fromkeys(row["folder"] for row in results))
    print(" | ".join(["method", *map(str, names), "mean", "standard error", "seconds"]))
    for method, folders in accuracies.items():
        every = np.array([value for values in folders.values() for value in values])
        error = every.std(ddof=1) / len(every) ** 0.5 if len(every) > 1 else float("nan")
        columns = [f"{np.mean(folders[name]):.1f}" for name in names]
        print(" | ".join([method, *columns, f"{every.mean():.1f}", f"{error:.1f}", f"{np.mean(seconds[method]):.0f}"]))


if __name__ == "__main__":
    main()
