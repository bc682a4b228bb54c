"""Kill `maple train`, `fit` and `sweep` (in two processes, and on Ray) at random moments, and compare the results.

Each command runs once undisturbed. Then it is started again and again in another folder and killed, with all of its
processes, until it has been killed `--kills` times, or has finished before; it then runs to its end. The prompts and
the rows must be the same bytes, and no temporary file may be left. The default takes half an hour or so on two cores.

    python scripts/kill_commands.py --kills 20
"""

import argparse
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

SMALL = [
    *("--backbone", "maple-tiny", "--pretrained", "random", "--device", "cpu"),
    *("--set", "method.prompt_depth=1", "--set", "train.epochs=60", "--set", "train.batch_size=4"),
]
SWEEP = ["sweep", "few-shot", "--methods", "maple", "--shots", "2,4", "--seeds", "1", "--datasets", "IMAGES", *SMALL]
COMMANDS = {
    "train": ["train", "--method", "maple", "--dataset", "IMAGES", "--shots", "4", *SMALL],
    "fit": ["fit", "IMAGES", "--method", "maple", "--shots", "4", *SMALL],
    "sweep": [*SWEEP, "--jobs", "2"],
    "sweep on Ray": [*SWEEP, "--executor", "ray"],
}


def results(folder: Path) -> dict[str, object]:
    """The prompts of all runs as bytes, and their rows in any order."""
    contents: dict[str, object] = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if path.name == "prompts.safetensors":
            contents[name] = path.read_bytes()
        elif path.name == "rows.jsonl":
            contents[name] = sorted(
                json.dumps(json.loads(line), sort_keys=True) for line in path.read_text().splitlines()
            )
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
            straight, killed, images = (Path(parent) / part for part in ("straight", "killed", "images"))
            write_images(images)
            arguments = [str(images) if argument == "IMAGES" else argument for argument in arguments]

            def start(output: Path, arguments: list[str] = arguments) -> subprocess.Popen[bytes]:
                command = [sys.executable, "-m", "maple", *arguments, "--output", str(output)]
                null = subprocess.DEVNULL
                return subprocess.Popen(command, env=environment, stdout=null, stderr=null, start_new_session=True)

            began = time.monotonic()
            status, seconds, kills = start(straight).wait(), time.monotonic() - began, 0
            for _ in range(options.kills):
                process = start(killed)
                time.sleep(moments.uniform(0.1, 1) * seconds)
                if process.poll() is not None:
                    break
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                kills += 1
            ends = (status, start(killed).wait())
            left = [str(path.relative_to(killed)) for path in killed.rglob("*.tmp")]
            same = results(killed) == results(straight) and ends == (0, 0) and not left
            differing += not same
            runs = sum(path.endswith("prompts.safetensors") for path in results(killed))
            verdict = "the same bytes" if same else f"DIFFERENT (statuses {ends}, left {left})"
            print(f"{name}: {kills} kills, {runs} runs: {verdict}", flush=True)
    sys.exit(differing > 0)


if __name__ == "__main__":
    main()
