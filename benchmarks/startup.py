"""Measure startup: seconds of the commands, of loading a CLIP from a file, and to the first training step.

Usage: python -m benchmarks.startup [--backbone ViT-B-16-quickgelu] [--rounds 3] [--only commands] [--output FOLDER]
`maple predict` classifies one image with the packaged CLIP, from prompts and from an ONNX export of them; a plain
script does the same job with open_clip. Seconds of the processor hold on a busy machine, too.
Every measurement runs in a new process; the ways that are compared take turns. Loading is compared with the usual
way: build the model with its initialisation, read the file, copy. Both must give the same weights. Writes JSON.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image
from safetensors.torch import save_file

import maple
from benchmarks import common
from maple import build_method, load_clip
from maple.checkpoint import save_prompts
from maple.export import export_run

COMMANDS = {
    "python": ["-c", "pass"],
    "import maple": ["-c", "import maple"],
    "maple --help": ["-m", "maple", "--help"],
    "maple train --help": ["-m", "maple", "train", "--help"],
    "maple predict --help": ["-m", "maple", "predict", "--help"],
    "import torch": ["-c", "import torch"],
    "import torch, open_clip": ["-c", "import torch, open_clip"],
    "import maple.runs": ["-c", "import maple.runs"],
}

_COLOURS, _THINGS = ("red", "green", "blue", "grey"), ("cat", "car", "tree", "house")
_NAMES = [f"{colour} {thing}" for colour in _COLOURS for thing in _THINGS]
_PLAIN_PREDICT = """
import sys
import open_clip, torch
from PIL import Image
folder, image, *names = sys.argv[1:]
model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
ids = open_clip.get_tokenizer(f"local-dir:{folder}")([f"a photo of a {name}." for name in names])
with torch.no_grad():
    features = model.encode_image(preprocess(Image.open(image).convert("RGB"))[None], normalize=True)
    logits = model.logit_scale.exp() * features @ model.encode_text(ids, normalize=True).T
for probability, index in zip(*logits.softmax(dim=1)[0].topk(5)):
    print(f"{names[index]}: {probability:.3f}")
"""

# Each prints its measurements; the memory peak counts from before the weights are read.
_LOAD = """
import sys, time
import maple.runs, open_clip
from safetensors.torch import load_file
from maple.clip.backbone import fingerprint
name, path = sys.argv[1:]
# The peak of this process only: that of getrusage starts with the parent's.
status = lambda: open("/proc/self/status").read()
peak = lambda: int(status().split("VmHWM:")[1].split()[0])
before, begin = peak(), time.perf_counter()
{body}
seconds = time.perf_counter() - begin
print(seconds, (peak() - before) * 1024, fingerprint(model.state_dict()))
"""
_WAYS = {
    "ours": "from maple import load_clip; model = load_clip(name, path).model",
    "plain": "model = open_clip.create_model(name); model.load_state_dict(load_file(path)); "
    "fingerprint(model.state_dict())",
}
_FIRST_STEP = """
import json, os, sys
from pathlib import Path
from maple.config import resolve
from maple.runs import TrainProgress, train_run
class First(TrainProgress):
    def step(self, report):
        os._exit(0)
train_run(resolve([json.loads(sys.argv[1])]), Path(sys.argv[2]), device="cpu", progress=First())
"""

_SHORT = {"method": {"name": "maple", "prompt_depth": 3}, "train": {"epochs": 1}, "data": {"shots": 1}}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="ViT-B-16-quickgelu")
    parser.add_argument("--rounds", type=int, default=3)
    parts = ("commands", "loading", "first_step")
    parser.add_argument("--only", choices=parts, nargs="+", default=parts)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    results: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.safetensors"
        if "commands" in arguments.only:
            results["commands"] = command_times({**COMMANDS, **predictions(Path(folder))}, arguments.rounds)
        if {"loading", "first_step"} & set(arguments.only):
            write_weights(arguments.backbone, path)
        if "loading" in arguments.only:
            results["loading"] = load_times(arguments.backbone, path, arguments.rounds)
        if "first_step" in arguments.only:
            steps = {
                "maple-small": {"backbone": {"name": "maple-small"}},
                arguments.backbone: {"backbone": {"name": arguments.backbone, "pretrained": str(path)}},
            }
            results["first_step"] = {
                name: first_step(settings, Path(folder), arguments.rounds) for name, settings in steps.items()
            }
    settings = {"backbone": arguments.backbone, "rounds": arguments.rounds}
    common.write(arguments.output, "startup", settings, results)


def predictions(folder: Path) -> dict[str, list[str]]:
    """Commands that classify one image among sixteen trained names with the packaged CLIP."""
    image, prompts, export = folder / "image.jpg", folder / "prompts.safetensors", folder / "export"
    Image.effect_noise((500, 400), 60).convert("RGB").save(image)
    save_prompts(prompts, build_method({"name": "maple", "prompt_depth": 4}, load_clip("maple-small"), _NAMES))
    export_run(prompts, export)
    clip = Path(maple.__file__).parent / "assets" / "small_clip"
    return {
        "maple predict PROMPTS IMAGE": ["-m", "maple", "predict", str(prompts), str(image)],
        "maple predict EXPORT IMAGE": ["-m", "maple", "predict", str(export), str(image)],
        "plain script with open_clip": ["-c", _PLAIN_PREDICT, str(clip), str(image), *_NAMES],
    }


def command_times(commands: dict[str, list[str]], rounds: int) -> dict[str, dict[str, float]]:
    """Wall and processor seconds of each command, in turn; medians, and the smallest."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            taken[name].append(timed(command))
    seconds = {}
    for name, pairs in taken.items():
        wall, busy = ([pair[kind] for pair in pairs] for kind in (0, 1))
        seconds[name] = {"wall": statistics.median(wall), "processor": statistics.median(busy), "least": min(wall)}
        print(f"{name}: {statistics.median(wall):.3f} s, of the processor {statistics.median(busy):.3f} s (medians)")
    return seconds


def timed(command: list[str]) -> tuple[float, float]:
    """Wall and processor seconds of a Python process; exit if it fails."""
    before, begin = os.times(), time.perf_counter()
    subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - begin, os.times()
    busy = after.children_user + after.children_system - before.children_user - before.children_system
    return wall, busy


def write_weights(name: str, path: Path) -> None:
    """Write random weights of an architecture to a file."""
    state = load_clip(name, "random").model.state_dict()
    save_file({key: value.contiguous() for key, value in state.items()}, path)


def load_times(name: str, path: Path, rounds: int) -> dict[str, float]:
    """Seconds and peak memory above the imports of both ways, in turn; both with the weights' fingerprint."""
    seconds: dict[str, list[float]] = {way: [] for way in _WAYS}
    memory: dict[str, list[float]] = {way: [] for way in _WAYS}
    prints = set()
    for _ in range(rounds):
        for way, body in _WAYS.items():
            command = [sys.executable, "-c", _LOAD.format(body=body), name, str(path)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            taken, peak, weights = done.stdout.split()
            seconds[way].append(float(taken))
            memory[way].append(float(peak) / path.stat().st_size)
            prints.add(weights)
    if len(prints) != 1:
        raise SystemExit("the two ways load different weights")
    result = {f"seconds_{way}": statistics.median(values) for way, values in seconds.items()}
    result |= {f"memory_{way}": statistics.median(values) for way, values in memory.items()}
    result["ratio"] = statistics.median(b / a for a, b in zip(seconds["ours"], seconds["plain"], strict=True))
    print(
        f"{name} from a file of {path.stat().st_size / 1e6:.0f} MB: {result['seconds_ours']:.2f} s and "
        f"{result['memory_ours']:.2f} of its size; the usual way {result['seconds_plain']:.2f} s and "
        f"{result['memory_plain']:.2f}; {result['ratio']:.2f}x"
    )
    return result


def first_step(settings: dict[str, dict[str, str]], folder: Path, rounds: int) -> dict[str, float]:
    """Seconds from the start of Python to the end of the first training step, on the bundled data; medians."""
    begun = []
    for number in range(rounds):
        run = folder / f"run_{len(list(folder.iterdir()))}_{number}"
        begun.append(timed(["-c", _FIRST_STEP, json.dumps({**_SHORT, **settings}), str(run)]))
    wall, busy = (statistics.median(pair[kind] for pair in begun) for kind in (0, 1))
    print(f"{settings['backbone']['name']}: first training step after {wall:.2f} s, of the processor {busy:.2f} s")
    return {"wall": wall, "processor": busy}


if __name__ == "__main__":
    main()
