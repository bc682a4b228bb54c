"""Kill `maple train`, `fit` and `sweep` at random moments, and compare the results with those of undisturbed runs.

A fit is one of a given method, or of a choice; a sweep runs in two processes, or on Ray. Each command runs once
undisturbed. Then it is started again and again in another folder and killed, with all of its processes, until it has
been killed `--kills` times; whenever it has finished before, it begins anew in a new folder. At the end of each folder
the prompts and the rows must be the same bytes, and no temporary file may be left. The default takes half an hour or
more on two cores.

    python scripts/kill_commands.py --kills 20
"""

import argparse
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

TINY = ["--backbone", "maple-tiny", "--pretrained", "random", "--device", "cpu", "--set", "train.batch_size=4"]
SMALL = [*TINY, "--set", "method.prompt_depth=1", "--set", "train.epochs=60"]
SWEEP = ["sweep", "few-shot", "--methods", "maple", "--shots", "2,4", "--seeds", "1", "--datasets", "IMAGES", *SMALL]
COMMANDS = {
    "train": ["train", "--method", "maple", "--dataset", "IMAGES", "--shots", "4", *SMALL],
    "fit": ["fit", "IMAGES", "--method", "maple", "--shots", "4", *SMALL],
    # With time for all parts of all methods, whatever the machine does meanwhile.
    "fit auto": [
        *("fit", "IMAGES", "--methods", "zero_shot,clip_adapter,coop", "--minutes", "600", "--shots", "4", *TINY),
        *("--set", "train.epochs=30"),
    ],
    "sweep": [*SWEEP, "--jobs", "2"],
    "sweep on Ray": [*SWEEP, "--executor", "ray"],
}


def results(folder: Path) -> dict[str, object]:
    """The prompts of all runs as bytes, their rows in any order, and the scores of the methods that were tried."""
    contents: dict[str, object] = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if path.name == "prompts.safetensors":
            contents[name] = path.read_bytes()
        elif path.name == "rows.jsonl":
            contents[name] = sorted(
                json.dumps(json.loads(line), sort_keys=True) for line in path.read_text().splitlines()
            )
        elif path.name == "selection.json":
            contents[name] = [
                (entry["recipe"], entry["scores"]) for entry in json.loads(path.read_text())["candidates"]
            ]
    return contents


def write_images(folder: Path) -> None:
    """Write six images of each of two classes."""
    for name, colour in (("cat", 40), ("dog", 200)):
        (folder / name).mkdir(parents=True)
        for number in range(6):
            Image.new("RGB", (40, 40), (colour, 20 * number, 90)).save(folder / name / f"{number}.png")


def main() -> None:
    """Print one line for each command; the exit status is 1 if a result differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="how often each command is killed")
    parser.add_argument("--only", choices=COMMANDS, help="one command alone")
    parser.add_argument("--seed", type=int, default=1, help="of the moments")
    options = parser.parse_args()
    moments, differing = random.Random(options.seed), 0
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    for name, arguments in COMMANDS.items():
        if options.only not in (None, name):
            continue
        with tempfile.TemporaryDirectory() as parent:
            straight, images = Path(parent) / "straight", Path(parent) / "images"
            write_images(images)
            arguments = [str(images) if argument == "IMAGES" else argument for argument in arguments]

            def start(output: Path, arguments: list[str] = arguments) -> subprocess.Popen[bytes]:
                command = [sys.executable, "-m", "maple", *arguments, "--output", str(output)]
                null = subprocess.DEVNULL
                return subprocess.Popen(command, env=environment, stdout=null, stderr=null, start_new_session=True)

            began = time.monotonic()
            status, seconds, kills, faults = start(straight).wait(), time.monotonic() - began, 0, []
            for number in itertools.count():
                killed, kills_before, ended = Path(parent) / f"killed{number}", kills, None
                while kills < options.kills and ended is None:
                    process = start(killed)
                    try:
                        ended = process.wait(moments.uniform(0.1, 1) * seconds)
                    except subprocess.TimeoutExpired:
                        os.killpg(process.pid, signal.SIGKILL)
                        process.wait()
                        kills += 1
                statuses = (status, start(killed).wait() if ended is None else ended)
                left = [str(path.relative_to(killed)) for path in killed.rglob("*.tmp")]
                if results(killed) != results(straight) or statuses != (0, 0) or left:
                    faults.append(f"{kills - kills_before} kills: statuses {statuses}, left {left}")
                if kills == options.kills:
                    break
            runs = sum(path.endswith("prompts.safetensors") for path in results(straight))
            verdict = f"DIFFERENT ({'; '.join(faults)})" if faults else "the same bytes"
            print(f"{name}: {kills} kills in {number + 1} folders, {runs} runs: {verdict}", flush=True)
            differing += bool(faults)
    sys.exit(differing > 0)


if __name__ == "__main__":
    main()
