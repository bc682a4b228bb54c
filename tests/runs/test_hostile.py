"""Files with damaged or hostile contents: every command answers, or says what is wrong, soon and in little memory."""

import json
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from typer.testing import CliRunner

from maple.checkpoint import load_prompts, read_prompts, save_prompts
from maple.cli import app
from maple.clip import Backbone, load_clip
from maple.config import read_preset, resolve
from maple.data.published.split_files import read_split
from maple.errors import CheckpointError, ConfigError, DataError, MapleError
from maple.methods import METHODS, build_method, describe_methods
from maple.report import collect, write_report
from maple.runs import evaluate_run, train_run

LONGEST = 20.0
MEMORY = 6 * 2**30

TEXTS: dict[str, bytes] = {
    "empty": b"",
    "not UTF-8": b'{"method": {"name": "\xff\xfe"}}',
    "nested deeply": b"[" * 100_000,
    "nested": b'{"method": ' + b"[" * 600 + b"]" * 600 + b"}",
    "nested tables": b'{"a": ' * 300 + b"1" + b"}" * 300,
    "many digits": b'{"seed": ' + b"9" * 10_000 + b"}",
    "digits": b'{"seed": ' + b"9" * 500 + b"}",
    "not a number": b'{"seed": NaN}',
    "infinite": b'{"seed": 1e999}',
    "a list": b"[]",
    "a number": b"5",
    "a text": b'"text"',
    "null": b"null",
    "an empty table": b"{}",
    "repeated keys": b'{"seed": 1, "seed": 2}',
    "half": b'{"seed": 1, ',
    "zeros": bytes(1000),
}
VALUES: list[Any] = [None, True, -1, 10**30, 1e300, "", "text", "\ud800", "\x1b[2J", [], [5], [[]], {}, {"a": []}]
VALUES += ["x" * 100_000, [{"a": "b"}], {"name": 5}, 10**18]
RUN_FILES = ["config.json", "environment.json", "images.json", "items.json", "metrics.jsonl", "rows.jsonl"]
RUN_FILES += ["trained_images.json"]


def changed(content: Any, depth: int = 3) -> Iterator[tuple[str, Any]]:
    """Copies of parsed JSON with one value replaced, or left out; of a list, the first value."""
    if depth == 0 or not isinstance(content, dict | list):
        return
    keys: list[Any] = list(content) if isinstance(content, dict) else list(range(len(content)))[:1]
    for key in keys:
        others: Any = dict(content) if isinstance(content, dict) else list(content)
        for value in VALUES:
            others[key] = value
            yield f"{key} = {value!r:.30}", others
        for place, value in changed(content[key], depth - 1):
            others[key] = value
            yield f"{key}.{place}", others


def try_all(trials: Iterator[tuple[str, Callable[[], object]]]) -> int:
    """Run each trial; it may raise a MapleError only, must be fast, and take little memory."""
    problems, count = [], 0
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY + 20 * 2**30, before[1]))
    try:
        for name, trial in trials:
            count += 1
            start = time.monotonic()
            try:
                trial()
            except MapleError as error:
                if len(str(error)) > 5000:
                    problems.append(f"{name}: a message of {len(str(error)):,} characters")
            except Exception as error:  # noqa: BLE001 - what this test is about
                problems.append(f"{name}: {type(error).__name__}: {str(error)[:200]}")
            if (seconds := time.monotonic() - start) > LONGEST:
                problems.append(f"{name}: {seconds:.0f} s")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert not problems, f"{len(problems)} of {count}:\n" + "\n".join(problems[:40])
    return count


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hostile") / "pictures"
    for number, name in enumerate(("cat", "dog")):
        for part in ("train", "test"):
            (root / part / name).mkdir(parents=True)
            for index in range(2):
                colour = (90 * number, 40 * index + 9, 90 if part == "test" else 200)
                Image.new("RGB", (40, 40), colour).save(root / part / name / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_clip("maple-tiny", "random")


@pytest.fixture(scope="module")
def trained(images: Path) -> Path:
    layer = {
        "method": {"name": "coop", "prompt_length": 2},
        "backbone": {"name": "maple-tiny", "pretrained": "random"},
        "data": {"dataset": str(images), "shots": None},
        "train": {"epochs": 1, "batch_size": 4},
    }
    run = train_run(resolve([layer]), images.parent / "run").folder
    evaluate_run(run)
    return run


def invoke(*arguments: object) -> None:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception


@pytest.mark.parametrize(
    ("command", "name"),
    [
        *(("inspect", name) for name in ("config.json", "metrics.jsonl", "rows.jsonl")),
        *(("report", name) for name in RUN_FILES[:2] + RUN_FILES[3:6]),
        *(("evaluate", name) for name in RUN_FILES if name not in ("environment.json", "metrics.jsonl")),
        *(("train", name) for name in ("config.json", "images.json", "metrics.jsonl")),
    ],
)
def test_files_of_a_run(command: str, name: str, trained: Path, tmp_path: Path, backbone: Backbone) -> None:
    run = tmp_path / "runs" / "run"
    shutil.copytree(trained, run)
    path, content = run / name, (trained / name).read_text()
    method = load_prompts(run / "prompts.safetensors", backbone)
    settings = resolve([json.loads((trained / "config.json").read_text())])

    def act() -> None:
        if command == "inspect":
            invoke("inspect", run)
            invoke("inspect", run, "--json")
        elif command == "report":
            collect(run.parent, describe_methods())
            write_report(run.parent, ["md"], methods=describe_methods())
        elif command == "evaluate":
            evaluate_run(run, method=method)
        else:
            train_run(settings, run)

    def trials() -> Iterator[tuple[str, Callable[[], object]]]:
        for label, data in TEXTS.items():
            path.write_bytes(data)
            yield label, act
        parsed = json.loads(content)
        step = {"train": 3, "report": 5}.get(command, 9)
        for number, (label, other) in enumerate(changed(parsed)):
            if number % step == 0:
                path.write_text(json.dumps(other) + "\n")
                if command in ("evaluate", "train") and name != "rows.jsonl":
                    shutil.copy(trained / "rows.jsonl", run / "rows.jsonl")
                yield label, act

    assert try_all(trials()) >= 20


Rewrite = Callable[[dict[str, Any], dict[str, torch.Tensor]], object]
TENSORS: dict[str, Rewrite] = {
    "integers": lambda _, t: t.update({k: v.to(torch.int64) for k, v in t.items() if v.is_floating_point()}),
    "booleans": lambda _, t: t.update({k: v > 0 for k, v in t.items()}),
    "complex": lambda _, t: t.update({k: v.to(torch.complex64) for k, v in t.items()}),
    "of 8 bits": lambda _, t: t.update({k: v.to(torch.float8_e4m3fn) for k, v in t.items()}),
    "infinite in float32": lambda _, t: t.update({k: v.double().fill_(1e300) for k, v in t.items()}),
    "NaN": lambda _, t: t.update({k: v.double().fill_(torch.nan) for k, v in t.items()}),
    "scalars": lambda _, t: t.update({k: torch.zeros(()) for k in t}),
    "empty": lambda _, t: t.update({k: torch.zeros(0, 4) for k in t}),
    "none": lambda _, t: t.clear(),
    "a million tokens": lambda c, _: c["method"].update(prompt_length=10**6, init_text=""),
    "a milliard tokens": lambda c, _: c["method"].update(prompt_length=10**9, init_text=""),
    "a milliard vision tokens": lambda c, _: c["method"].update(vision_prompt_length=10**9),
    "a milliard text tokens": lambda c, _: c["method"].update(text_prompt_length="1000000000", init_text=""),
    "tokens for each class": lambda c, _: (
        c["method"].update(prompt_length=70, class_specific=True, init_text=""),
        c.update(class_names=[f"c{n}" for n in range(90_000)]),
    ),
    "a million blocks": lambda c, _: c["method"].update(prompt_depth=10**6),
    "a million class names": lambda c, _: c.update(class_names=[f"c{n}" for n in range(10**6)]),
    "a long class name": lambda c, _: c.update(class_names=["x" * 10**6, "b"]),
    "a long text": lambda c, _: c["method"].update(init_text="x" * 10**6),
    "a long template": lambda c, _: c["method"].update(templates=["x" * 10**6 + " {}"]),
    "class names in one text": lambda c, _: c.update(class_names="cat"),
    "labels of no class": lambda _, t: t.update(labels=torch.tensor([0, 7])),
    "negative labels": lambda _, t: t.update(labels=torch.tensor([0, -1])),
}


@pytest.mark.parametrize(
    "name", ["coop", "cocoop", "vpt", "independent_vl", "maple", "kgcoop", "taskres", "tip_adapter"]
)
def test_prompts_files(name: str, tmp_path: Path, backbone: Backbone) -> None:
    depths = {setting: 2 for setting in METHODS[name].Settings.model_fields if setting.endswith("depth")}
    method = build_method({"name": name, **depths}, backbone, ["cat", "dog"])
    whole, path = tmp_path / "whole.safetensors", tmp_path / "prompts.safetensors"
    save_prompts(whole, method, {"data": {"dataset": "emoji-animals"}})
    with safe_open(str(whole), framework="pt") as opened:
        header = json.loads(opened.metadata()["maple"])
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dict

    def act() -> None:
        read_prompts(path)
        load_prompts(path, backbone)

    def trials() -> Iterator[tuple[str, Callable[[], object]]]:
        for label, text in TEXTS.items():
            save_file(tensors, path, metadata={"maple": text.decode("latin-1")})
            yield label, act
        for number, (label, other) in enumerate(changed(header)):
            if number % (5 if name == "maple" else 29) == 0:
                save_file(tensors, path, metadata={"maple": json.dumps(other)})
                yield label, act
        for label, change in TENSORS.items():
            other, changed_tensors = json.loads(json.dumps(header)), dict(tensors)
            change(other, changed_tensors)
            save_file(changed_tensors, path, metadata={"maple": json.dumps(other)})
            yield label, act

    assert try_all(trials()) >= 40
    save_file(tensors, path, metadata={"maple": json.dumps(header)})
    load_prompts(path, backbone)


@pytest.mark.parametrize("kind", ["integers", "complex"])
def test_the_type_of_prompts_is_named(kind: str, tmp_path: Path, backbone: Backbone) -> None:
    method, path = build_method({"name": "coop"}, backbone, ["cat", "dog"]), tmp_path / "prompts.safetensors"
    save_prompts(path, method)
    with safe_open(str(path), framework="pt") as opened:
        header, tensors = opened.metadata(), {"text_prompt.0": opened.get_tensor("text_prompt.0")}
    TENSORS[kind]({}, tensors)
    save_file(tensors, path, metadata=header)
    with pytest.raises(CheckpointError, match=r"text_prompt.0 has the type torch\.\w+ instead of torch.float32"):
        load_prompts(path, backbone)
    save_file({"text_prompt.0": torch.zeros(16, backbone.text.width).half()}, path, metadata=header)
    load_prompts(path, backbone)


def test_presets_and_lists_of_names(tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    preset = (b"seed = 0x" + b"f" * 10_000, b"seed = " + b"9" * 10_000, b"a = " + b"[" * 5000, b"\xff", b"a = nan")
    for content in (*TEXTS.values(), *preset, b"method = 5", b"[method]\nname = 5", b"[train]\nlr = nan"):
        path.write_bytes(content)
        with suppress(ConfigError):
            resolve([read_preset(str(path))])
    path.write_bytes(b"\xef\xbb\xbf[train]\r\nlr = 0.5\r\n")
    assert resolve([read_preset(str(path))]).train.lr == 0.5
    for override in (
        "seed=" + "9" * 10_000,
        "seed=0x" + "f" * 9000,
        "train.lr=" + "[" * 9000,
        "seed=18446744073709551616",
    ):
        with pytest.raises(ConfigError):
            resolve([], [override])


def test_split_files_with_huge_labels(tmp_path: Path) -> None:
    path = tmp_path / "split.json"
    for label in (2, 10**9, 10**18, 10**30):
        rows = [["a.png", 0, "a"], ["b.png", label, "b"]]
        path.write_text(json.dumps({"train": rows, "val": [], "test": []}))
        with pytest.raises(DataError):
            read_split(path)


def test_texts_of_others_cannot_control_the_terminal(tmp_path: Path, backbone: Backbone) -> None:
    names, path = ["cat\x1b[2J\x1b]0;title\x07", "d\x9bog\r"], tmp_path / "prompts.safetensors"
    save_prompts(path, build_method({"name": "coop"}, backbone, names), {"data\x1b[31m": {"dataset": "a\x1b[5m"}})
    result = CliRunner().invoke(app, ["inspect", str(path)], catch_exceptions=False)
    assert r"cat\x1b[2J\x1b]0;title\x07, d\x9bog\r" in result.output
    assert "\x1b" not in result.output
    assert "\x9b" not in result.output
