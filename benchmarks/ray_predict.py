"""Predictions on a Ray cluster of this machine: images per second, memory, and the answers with a worker killed.

    python -m benchmarks.ray_predict RUN --images 20000 --actors 2 --output build/benchmarks

Emoji scenes are drawn to a Parquet file. Two actors classify them, and when half of the images have rows, one actor is
killed. Every image must have one row, with the answer of a single process, which is timed afterwards on the same rows.
Memory is the resident size of each process, shared pages of Ray's object store included, every second.
"""

import argparse
import io
import os
import signal
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks import common
from maple.data.emoji import archive, draw
from maple.inference import ImageSource, load_predictor, predict_on_ray
from maple.inference.prediction_tables import to_row
from maple.inference.ray_predict import _decode
from maple.inference.sources.bulk_sources import list_units, read_unit

ROWS_PER_GROUP = 500
TOLERANCE = 1e-5
ACTOR, READER = "ray::MapWorker", "ray::MapBatches"


def draw_scenes(path: Path, images: int) -> None:
    """Write scenes of all food emoji to a Parquet file, as PNG with their paths."""
    codes = [concept.code for concept in archive().concepts("food")]
    with pq.ParquetWriter(path, pa.schema([("path", pa.string()), ("bytes", pa.binary())])) as writer:
        for start in range(0, images, ROWS_PER_GROUP):
            numbers = range(start, min(start + ROWS_PER_GROUP, images))
            paths = [f"twemoji/{codes[n % len(codes)]}/{n // len(codes)}" for n in numbers]
            contents = []
            for scene in paths:
                buffer = io.BytesIO()
                draw(scene).save(buffer, format="PNG")
                contents.append(buffer.getvalue())
            writer.write_table(pa.table({"path": paths, "bytes": pa.array(contents, pa.binary())}))


def processes() -> dict[int, tuple[str, float]]:
    """The title and resident megabytes of this process and of those that it started, directly or not."""
    parents, facts = {}, {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal():
            continue
        try:
            lines = (folder / "status").read_text().splitlines()
            title = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except OSError:  # it has ended
            continue
        status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
        parents[int(folder.name)] = int(status["PPid"])
        facts[int(folder.name)] = (title, int(status.get("VmRSS", "0 kB").split()[0]) / 1000)

    def is_ours(pid: int) -> bool:
        while pid not in (0, os.getpid()):
            pid = parents.get(pid, 0)
        return pid != 0

    return {pid: fact for pid, fact in facts.items() if is_ours(pid)}


class Memory(threading.Thread):
    """Samples the memory of the driver, the actors and the reading tasks every second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.samples: dict[str, list[float]] = defaultdict(list)
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.wait(1.0):
            sums: dict[str, float] = defaultdict(float)
            for pid, (title, size) in processes().items():
                kind = "driver" if pid == os.getpid() else title.partition("(")[0]
                if kind in ("driver", ACTOR, READER):
                    sums[kind] = max(sums[kind], size)
            for kind, size in sums.items():
                self.samples[kind].append(size)

    def report(self) -> dict[str, list[float]]:
        """The median megabytes of the largest process of each kind in each fifth of the time."""
        self._ended.set()
        fifths = {}
        for kind, sizes in self.samples.items():
            step = max(1, len(sizes) // 5)
            fifths[kind] = [
                round(median(sizes[start : start + step])) for start in range(0, step * 5, step)[: len(sizes)]
            ]
        return fifths


def kill_an_actor() -> bool:
    """Kill one actor of this process's cluster with SIGKILL, and return whether there was one."""
    for pid, (title, _) in processes().items():
        if title.startswith(ACTOR):
            os.kill(pid, signal.SIGKILL)
            return True
    return False


def on_ray(run: str, table: Path, output: Path, actors: int, images: int) -> dict[str, Any]:
    """Classify the table with one actor killed midway; return the rates and the memory."""
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(num_cpus=actors, include_dashboard=False, log_to_driver=False, logging_level="error")
    times: list[tuple[float, int]] = []
    killed_at: list[int] = []

    def follow(done: int) -> None:
        times.append((time.perf_counter(), done))
        if done > images // 2 and not killed_at and kill_an_actor():
            killed_at.append(done)

    memory = Memory()
    memory.start()
    began = time.perf_counter()
    result = predict_on_ray(run, [str(table)], output, top=3, actors=actors, on_images=follow)
    seconds = time.perf_counter() - began
    ray.shutdown()
    (first, done_first), (last, done_last) = times[0], times[-1]
    return {
        "images": result.images,
        "killed_after_images": killed_at,
        "seconds": seconds,
        "images_per_second": result.images / seconds,
        "images_per_second_after_the_start": (done_last - done_first) / (last - first),
        "seconds_to_first_rows": first - began,
        "megabytes_in_each_fifth": memory.report(),
        "load": os.getloadavg(),
    }


def alone(run: str, table: Path) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """The rows of a single process by source, and its rate once the model is loaded."""
    predictor = load_predictor(run, device="cpu")
    predictor.set_class_names(predictor.trained_names)
    sources: list[str] = []

    def images() -> Any:
        for unit in list_units([str(table)]):
            for image in read_unit(unit):
                sources.append(image.source)
                yield ImageSource(image.path, lambda image=image: _decode(image))

    began = time.perf_counter()
    rows = [to_row(result) for result in predictor.stream(images(), top=3)]
    seconds = time.perf_counter() - began
    rate = {"seconds": seconds, "images_per_second": len(rows) / seconds, "load": os.getloadavg()}
    return dict(zip(sources, rows, strict=True)), rate


def compare(output: Path, expected: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Whether the folder answers each image once, and as the single process does."""
    rows = pq.read_table(output).to_pylist()
    by_source = {row["source"]: row for row in rows}
    differences = [
        abs(here - there)
        for source, row in expected.items()
        for here, there in zip(by_source[source]["probabilities"], row["probabilities"], strict=True)
    ]
    return {
        "rows": len(rows),
        "every_image_once": len(rows) == len(by_source) and by_source.keys() == expected.keys(),
        "same_classes": sum(by_source[source]["classes"] == row["classes"] for source, row in expected.items()),
        "largest_difference_of_probabilities": max(differences),
        "within_tolerance": max(differences) < TOLERANCE,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", help="a run folder, a prompts file or an export")
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--table", type=Path, help="where the scenes are kept, and read from if they were drawn before")
    parser.add_argument("--output", type=Path, help="a folder for the result as JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        table, output = arguments.table or Path(folder, "scenes.parquet"), Path(folder, "answers.parquet")
        if not table.exists():
            draw_scenes(table, arguments.images)
        arguments.images = pq.read_metadata(table).num_rows
        results: dict[str, Any] = {"megabytes_of_images": table.stat().st_size / 1e6}
        results["ray"] = on_ray(arguments.run, table, output, arguments.actors, arguments.images)
        expected, results["one_process"] = alone(arguments.run, table)
        results["comparison"] = compare(output, expected)
    for part, values in results.items():
        print(part, values)
    common.write(arguments.output, "ray-predict", vars(arguments), results)


if __name__ == "__main__":
    main()
