"""`maple serve` under many clients at once: requests per second, times, memory, and whether every answer is right.

    python -m benchmarks.serve_load RUN --clients 50 --seconds 20 --output build/benchmarks

Each client asks about another picture under another class list each time. What the server said of the same question
when it was asked alone is what it must say now, within 1e-4; "come again" (503) is counted and asked again.
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
from collections import Counter
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

TOLERANCE = 1e-4
WORDS = ("cat", "dog", "owl", "teapot", "car", "tree", "house", "river", "forest", "road", "apple", "kite", "flag")
Question = tuple[bytes, tuple[str, ...]]


def questions(count: int, lists: int, side: int) -> list[Question]:
    """Pictures of noise over a colour, each with one of so many class lists."""
    generator = np.random.default_rng(0)
    shuffle = random.Random(0)
    names = [tuple(f"{word} {n}" for word in shuffle.sample(WORDS, 3 + n % 8)) for n in range(lists)]
    found = []
    for n in range(count):
        pixels = generator.integers(0, 256, 3) * 0.7 + generator.integers(0, 76, (side, side, 3))
        buffer = BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(buffer, format="JPEG", quality=90)
        found.append((buffer.getvalue(), names[n % lists]))
    return found


def ask(connection: http.client.HTTPConnection, question: Question) -> tuple[int, Any]:
    """The status and the content of an answer."""
    picture, names = question
    parts = [b'--x\r\nContent-Disposition: form-data; name="images"; filename="a.jpg"\r\n\r\n' + picture + b"\r\n"]
    parts += [
        b'--x\r\nContent-Disposition: form-data; name="class_names"\r\n\r\n' + n.encode() + b"\r\n" for n in names
    ]
    parts += [b'--x\r\nContent-Disposition: form-data; name="zero_shot"\r\n\r\ntrue\r\n--x--\r\n']
    connection.request("POST", "/v1/predict", b"".join(parts), {"Content-Type": "multipart/form-data; boundary=x"})
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


def same(one: Any, other: Any) -> bool:
    """Whether two answers say the same of every class."""
    for which in ("best", "zero_shot"):
        first, second = ({r["class"]: r["probability"] for r in a["predictions"][0][which]} for a in (one, other))
        # Of nearly equal classes another may be the fifth.
        if any(abs(first[name] - second[name]) > TOLERANCE for name in first.keys() & second.keys()):
            return False
        if len(first.keys() & second.keys()) < len(first) - 1:
            return False
    return bool(one["class_count"] == other["class_count"])


class Load:
    """So many clients for so long."""

    def __init__(self, port: int, asked: list[Question], right: list[Any]) -> None:
        self.port, self.asked, self.right = port, asked, right
        self.seconds: list[float] = []
        self.told: Counter[str] = Counter()
        self.lock = threading.Lock()

    def client(self, number: int, until: float) -> None:
        """Ask until the time is over."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        chosen = random.Random(number)
        while time.monotonic() < until:
            index = chosen.randrange(len(self.asked))
            began = time.perf_counter()
            status, found = ask(connection, self.asked[index])
            took = time.perf_counter() - began
            with self.lock:
                if status == 200:
                    self.seconds.append(took)
                    self.told["right" if same(found, self.right[index]) else "wrong"] += 1
                else:
                    self.told[str(status)] += 1
            if status == 503:
                time.sleep(0.1 * chosen.random())
        connection.close()

    def run(self, clients: int, seconds: float) -> None:
        """All clients at once."""
        until = time.monotonic() + seconds
        threads = [threading.Thread(target=self.client, args=(n, until)) for n in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def memory(process: int) -> dict[str, float]:
    """The resident memory of a process now and at most so far, in MiB."""
    lines = Path(f"/proc/{process}/status").read_text(encoding="ascii").splitlines()
    found = {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines if line.startswith(("VmRSS", "VmHWM"))}
    return {"now": round(found["VmRSS"], 1), "peak": round(found["VmHWM"], 1)}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Start a server, ask alone, ask at once, twice; stop it."""
    command = [sys.executable, "-m", "maple", "serve", options.run, "--port", "0", "--no-examples"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        try:
            assert running.stdout is not None
            title, line = running.stdout.readline().strip(), running.stdout.readline()
            port = int(line.split()[3].rsplit(":", 1)[1])
            asked = questions(options.questions, options.lists, options.side)
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            alone = []
            began = time.perf_counter()
            for question in asked:
                status, found = ask(connection, question)
                if status != 200:
                    raise SystemExit(f"alone: {status} {found}")
                alone.append(found)
            one_by_one = len(asked) / (time.perf_counter() - began)
            rows = []
            for _ in range(options.rounds):
                before = memory(running.pid)
                load = Load(port, asked, alone)
                began = time.perf_counter()
                load.run(options.clients, options.seconds)
                took = time.perf_counter() - began
                times = np.array(load.seconds) * 1000
                rows.append(
                    {
                        "requests_per_second": round(len(times) / took, 1),
                        "milliseconds": {f"p{p}": round(float(np.percentile(times, p)), 1) for p in (50, 90, 99)},
                        "answers": dict(load.told),
                        "memory_before": before,
                        "memory_after": memory(running.pid),
                    }
                )
        finally:
            running.terminate()
    return {
        "model": title.removeprefix("maple: "),
        "clients": options.clients,
        "class_lists": options.lists,
        "picture_side": options.side,
        "one_client_requests_per_second": round(one_by_one, 1),
        "rounds": rows,
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": len(os.sched_getaffinity(0)),
            "threads": os.environ.get("OMP_NUM_THREADS"),
            "python": platform.python_version(),
        },
    }


def main() -> None:
    """Measure, print, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run")
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--questions", type=int, default=60)
    parser.add_argument("--lists", type=int, default=12, help="how many different class lists")
    parser.add_argument("--side", type=int, default=640, help="of the pictures, in pixels")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    found = measure(options)
    print(json.dumps(found, indent=1))
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "serve_load.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if any(row["answers"].get("wrong") for row in found["rounds"]):
        raise SystemExit("answers under load differ from those to one client")


if __name__ == "__main__":
    main()
