"""Kill `maple train`, `fit` and `sweep` (in two processes, and on Ray) at random moments, and compare the results.

Each command runs once undisturbed. Then it is started again and again in another folder and killed, with all of its
processes, until it has been killed `--kills` times, or has finished before; it then runs to its end. The prompts and
the rows must be the same bytes, and no temporary file may be left. The default takes about an hour on two cores.

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

SMALL = [
    *("--backbone", "maple-tiny", "--pretrained", "random", "--device", "cpu", "--method", "maple"),
    *("--set", "method.prompt_depth=2", "--set", "train.epochs=40"),
]
SWEEP = [
    *("sweep", "few-shot", "--methods", "maple", "--shots", "1,2", "--seeds", "1,2", *SMALL[:6]),
    *("--datasets", "emoji-animals", *SMALL[8:]),
]
COMMANDS = {
    "train": ["train", "--dataset", "emoji-animals", "--shots", "2", *SMALL],
    "fit": ["fit", "emoji-animals", "--shots", "2", *SMALL],
    "sweep": [*SWEEP, "--jobs", "2"],
    "sweep on Ray": [*SWEEP, "--executor", "ray"],
}


def results(folder: Path) -> dict[str, object]:
    """The prompts of all runs as bytes, and their rows in any order."""
    found: dict[str, object] = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if path.name == "prompts.safetensors":
            found[name] = path.read_bytes()
        elif path.name == "rows.jsonl":
            found[name] = sorted(json.dumps(json.loads(line), sort_keys=True) for line in path.read_text().splitlines())
    return found


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
            straight, killed = Path(parent) / "straight", Path(parent) / "killed"

            def start(output: Path, arguments: list[str] = arguments) -> subprocess.Popen[bytes]:
                command = [sys.executable, "-m", "maple", *arguments, "--output", str(output)]
                null = subprocess.DEVNULL
                return subprocess.Popen(command, env=environment, stdout=null, stderr=null, start_new_session=True)

            began = time.monotonic()
            status, seconds, kills = start(straight).wait(), time.monotonic() - began, 0
            for _ in range(options.kills):
                process = start(killed)
                time.sleep(moments.uniform(0.1, 1) * seconds)
                kills += process.poll() is None
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
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
