"""Load test of `maple serve`: requests per second, latency, memory, and whether every response is correct.

    python -m benchmarks.serve_load RUN --clients 50 --seconds 20 --output build/benchmarks
    OMP_NUM_THREADS=1 python -m benchmarks.serve_load RUN --server-core 0 --client-core 1

Each request has another image and another list of class names. The response must equal that to the same request sent
alone, within 1e-4; responses with status 503 are counted, and the client sends another request after a moment.

The work of a request is given in milliseconds of the processor, which other programs hardly change, and next to it what
its image alone costs without a server: decoding, and encoding in batches as large as the server's were. Their inverse
is the rate that no server can exceed on one core.
"""

import argparse
import http.client
import json
import os
import platform
import random
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

TOLERANCE = 1e-4
WORDS = ("cat", "dog", "owl", "teapot", "car", "tree", "house", "river", "forest", "road", "apple", "kite", "flag")
Query = tuple[bytes, tuple[str, ...]]


def make_queries(count: int, lists: int, side: int) -> list[Query]:
    """Images of noise over a colour, each with one of the lists of class names."""
    generator = np.random.default_rng(0)
    shuffle = random.Random(0)
    names = [tuple(f"{word} {n}" for word in shuffle.sample(WORDS, 3 + n % 8)) for n in range(lists)]
    queries = []
    for n in range(count):
        pixels = generator.integers(0, 256, 3) * 0.7 + generator.integers(0, 76, (side, side, 3))
        buffer = BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(buffer, format="JPEG", quality=90)
        queries.append((buffer.getvalue(), names[n % lists]))
    return queries


def request_prediction(
    connection: http.client.HTTPConnection, query: Query, *, zero_shot: bool = True
) -> tuple[int, Any]:
    """The status and the content of a response, with the predictions of zero-shot CLIP or without."""
    image, names = query
    parts = [b'--x\r\nContent-Disposition: form-data; name="images"; filename="a.jpg"\r\n\r\n' + image + b"\r\n"]
    parts += [
        b'--x\r\nContent-Disposition: form-data; name="class_names"\r\n\r\n' + n.encode() + b"\r\n" for n in names
    ]
    flag = b"true" if zero_shot else b"false"
    parts += [b'--x\r\nContent-Disposition: form-data; name="zero_shot"\r\n\r\n' + flag + b"\r\n--x--\r\n"]
    connection.request("POST", "/v1/predict", b"".join(parts), {"Content-Type": "multipart/form-data; boundary=x"})
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def is_same(answer: Any, other: Any) -> bool:
    """Whether two responses give every class the same probability."""
    for which in ("best", *(["zero_shot"] if answer["predictions"][0]["zero_shot"] else [])):
        first, second = ({r["class"]: r["probability"] for r in a["predictions"][0][which]} for a in (answer, other))
        # Nearly equal classes may change places, and with them the fifth one.
        if any(abs(first[name] - second[name]) > TOLERANCE for name in first.keys() & second.keys()):
            return False
        if len(first.keys() & second.keys()) < len(first) - 1:
            return False
    return bool(answer["class_count"] == other["class_count"])


class Load:
    """Several clients that send queries for a given time."""

    def __init__(self, port: int, queries: list[Query], expected: list[Any], zero_shot: bool) -> None:
        self.port, self.queries, self.expected, self.zero_shot = port, queries, expected, zero_shot
        self.seconds: list[float] = []
        self.outcomes: Counter[str] = Counter()
        self.lock = threading.Lock()

    def client(self, number: int, until: float) -> None:
        """Send queries until the time is over."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        generator = random.Random(number)
        while time.monotonic() < until:
            index = generator.randrange(len(self.queries))
            began = time.perf_counter()
            status, content = request_prediction(connection, self.queries[index], zero_shot=self.zero_shot)
            took = time.perf_counter() - began
            with self.lock:
                if status == 200:
                    self.seconds.append(took)
                    self.outcomes["right" if is_same(content, self.expected[index]) else "wrong"] += 1
                else:
                    self.outcomes[str(status)] += 1
            if status == 503:
                time.sleep(0.1 * generator.random())
        connection.close()

    def run(self, clients: int, seconds: float) -> None:
        """Run all clients at once."""
        until = time.monotonic() + seconds
        threads = [threading.Thread(target=self.client, args=(n, until)) for n in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def memory(process: int) -> dict[str, float]:
    """The resident memory of a process, now and at its peak, in MiB."""
    lines = Path(f"/proc/{process}/status").read_text(encoding="ascii").splitlines()
    sizes = {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines if line.startswith(("VmRSS", "VmHWM"))}
    return {"now": round(sizes["VmRSS"], 1), "peak": round(sizes["VmHWM"], 1)}


def processor_seconds(process: int) -> tuple[float, float]:
    """Seconds of the processor that a process has used, and those of the processes that it has started."""

    def used(number: str) -> float:
        fields = Path(f"/proc/{number}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    children = Path(f"/proc/{process}/task").glob("*/children")
    return used(str(process)), sum(used(child) for path in children for child in path.read_text().split())


def batch_sizes(port: int) -> tuple[float, float]:
    """How many batches the model has computed, and how many images."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as response:
        lines = dict(line.rsplit(" ", 1) for line in response.read().decode().splitlines() if line[0] != "#")
    return float(lines["maple_batch_images_count"]), float(lines["maple_batch_images_sum"])


def image_costs(options: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of the processor for an image without a server: to decode it, and to encode it in a batch."""
    from maple.data.images.reading import read_image
    from maple.inference import load_predictor

    predictor = load_predictor(options.run, zero_shot=options.frozen, device="cpu")
    least_side = predictor.preprocess.least_side if options.draft else None
    images = [image for image, _ in make_queries(options.questions, options.lists, options.side)]

    def decode(image: bytes) -> np.ndarray:
        return predictor.preprocess(read_image(image, least_side=least_side))

    batch = np.stack([decode(image) for image in images[: options.costs]])

    def milliseconds(work: Callable[[], object], count: int) -> float:
        taken = []
        for _ in range(5):
            began = time.process_time()
            work()
            taken.append(1000 * (time.process_time() - began) / count)
        return round(sorted(taken)[len(taken) // 2], 2)

    return {
        "decode": milliseconds(lambda: [decode(image) for image in images], len(images)),
        "encode": milliseconds(lambda: [predictor.encode_images(batch) for _ in range(4)], 4 * len(batch)),
    }


def on_core(core: int | None) -> list[str]:
    """The beginning of a command that runs on one core."""
    return [] if core is None else ["taskset", "--cpu-list", str(core)]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Start a server, send every query alone, then from many clients at once in several rounds, and stop it."""
    maple = [*on_core(options.server_core), sys.executable, "-m"]
    draft = ["--draft"] if options.draft else []
    command = [*maple, "maple", "serve", options.run, "--port", "0", "--no-examples", *draft]
    if options.client_core is not None:
        os.sched_setaffinity(0, [options.client_core])
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        try:
            assert running.stdout is not None
            title, line = running.stdout.readline().strip(), running.stdout.readline()
            port = int(line.split()[3].rsplit(":", 1)[1])
            queries = make_queries(options.questions, options.lists, options.side)
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/model") as model:
                zero_shot = json.load(model)["zero_shot"]
            alone = []
            began = time.perf_counter()
            for query in queries:
                status, content = request_prediction(connection, query, zero_shot=zero_shot)
                if status != 200:
                    raise SystemExit(f"alone: {status} {content}")
                alone.append(content)
            one_by_one = len(queries) / (time.perf_counter() - began)
            rows = []
            for _ in range(options.rounds):
                before, used, batches = memory(running.pid), processor_seconds(running.pid), batch_sizes(port)
                load = Load(port, queries, alone, zero_shot)
                began = time.perf_counter()
                load.run(options.clients, options.seconds)
                if not load.seconds:
                    raise SystemExit(f"no request succeeded: {dict(load.outcomes)}")
                took = time.perf_counter() - began
                times = np.array(load.seconds) * 1000
                server, decoders = (
                    1000 * (now - then) / max(1, len(times))
                    for now, then in zip(processor_seconds(running.pid), used, strict=True)
                )
                count, images = (now - then for now, then in zip(batch_sizes(port), batches, strict=True))
                rows.append(
                    {
                        "requests_per_second": round(len(times) / took, 1),
                        "milliseconds": {f"p{p}": round(float(np.percentile(times, p)), 1) for p in (50, 90, 99)},
                        "processor_milliseconds": {"server": round(server, 2), "decoders": round(decoders, 2)},
                        "images_per_batch": round(images / max(1.0, count), 1),
                        "answers": dict(load.outcomes),
                        "memory_before": before,
                        "memory_after": memory(running.pid),
                    }
                )
        finally:
            running.terminate()
    batch = max(1, round(float(np.median([row["images_per_batch"] for row in rows]))))
    costs = [*maple, "benchmarks.serve_load", options.run, "--costs", str(batch), "--side", str(options.side)]
    costs += [*(["--frozen"] if zero_shot else []), *draft]
    alone_costs = json.loads(subprocess.run(costs, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return {
        "model": title.removeprefix("maple: "),
        "clients": options.clients,
        "class_lists": options.lists,
        "picture_side": options.side,
        "draft": options.draft,
        "one_client_requests_per_second": round(one_by_one, 1),
        "rounds": rows,
        "image_alone_processor_milliseconds": alone_costs,
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "server_core": options.server_core,
            "client_core": options.client_core,
            "threads": os.environ.get("OMP_NUM_THREADS"),
            "python": platform.python_version(),
        },
    }


def main() -> None:
    """Measure, print the results, and write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run")
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--questions", type=int, default=60)
    parser.add_argument("--lists", type=int, default=12, help="number of different lists of class names")
    parser.add_argument("--side", type=int, default=640, help="size of the images, in pixels")
    parser.add_argument("--draft", action="store_true", help="decode large JPEGs at a part of their size")
    parser.add_argument("--server-core", type=int, help="the core that the server and its decoders share")
    parser.add_argument("--client-core", type=int, help="the core of the clients")
    parser.add_argument("--costs", type=int, help="only print what an image costs in batches of this size")
    parser.add_argument("--frozen", action="store_true", help="with --costs: encode for zero-shot CLIP, too")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.costs is not None:
        print(json.dumps(image_costs(options)))
        return
    results = measure(options)
    print(json.dumps(results, indent=1))
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "serve_load.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if any(row["answers"].get("wrong") for row in results["rounds"]):
        raise SystemExit("responses under load differ from those to a single client")


if __name__ == "__main__":
    main()
