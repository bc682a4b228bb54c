"""`maple fit`: from a folder of images to a comparison, in one command that can be interrupted and repeated."""

import json
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forked import run_maple, start_maple
from PIL import Image
from typer.testing import CliRunner

from maple.cli import app
from maple.config import RunSettings
from maple.data import load_dataset
from maple.data.saved_split import SAVED_SPLIT, read_saved_split, write_saved_split
from maple.errors import BackboneDownloadError, CheckpointError, ConfigError, DataError, MapleError
from maple.fitting import FitProgress, fit, fit_candidates, fit_folder, fit_settings, inspect_source, read_fit, workflow
from maple.runs import complete, evaluate_run, read_rows
from maple.runs.folder import refuse_other_run

TINY = {"backbone": {"name": "maple-tiny", "pretrained": "random:1"}, "data": {"shots": 3}}
QUICK = ["method.prompt_depth=2", "train.epochs=2", "train.batch_size=4"]
OPTIONS = [
    "--method",
    "maple",
    "--backbone",
    "maple-tiny",
    "--pretrained",
    "random:1",
    "--shots",
    "3",
    "--device",
    "cpu",
]
OPTIONS += [word for setting in QUICK for word in ("--set", setting)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images") / "pets"
    generator = np.random.default_rng(0)
    for name in ("cat", "dog", "red_owl"):
        (root / name).mkdir(parents=True)
        for number in range(8):
            pixels = generator.integers(0, 255, (4, 4, 3)).astype(np.uint8)
            Image.fromarray(pixels).resize((40, 40), Image.Resampling.BICUBIC).save(root / name / f"{number}.png")
    (root / "cat" / "broken.png").write_bytes(b"no image")
    return root


def settings_for(folder: Path, method: str = "maple", **layer: Any) -> RunSettings:
    overrides = QUICK if method == "maple" else []
    return fit_settings(str(folder), method, layer={**TINY, **layer}, overrides=overrides)


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


@pytest.fixture(scope="module")
def fitted(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "fitted"
    done = run("fit", folder, *OPTIONS, "--output", output)
    assert done.exit_code == 0, done.output
    return output


def test_files_of_a_fit(fitted: Path) -> None:
    names = {path.name for path in fitted.iterdir()}
    assert {"prompts.safetensors", "rows.jsonl", "report.html", "data.json", "images.json", "zero_shot"} <= names
    listed = read_saved_split(fitted / SAVED_SPLIT)
    assert (len(listed.train), len(listed.test)) == (18, 6)
    (ours,), (theirs,) = read_rows(fitted), read_rows(fitted / "zero_shot")
    assert ours["items"] == theirs["items"]
    assert (ours["images"], theirs["method"]["name"]) == (6, "zero_shot")
    assert {item["path"] for item in json.loads((fitted / "items.json").read_text())["items"]} <= {
        item.path for item in listed.train
    }
    found = json.loads((fitted / "data.json").read_text())
    assert found["findings"][0]["kind"] == "unreadable"
    assert found["findings"][0]["items"][0][0] == "cat/broken.png"
    page = (fitted / "report.html").read_text()
    assert "The most frequent mistakes" in page
    assert "1 file cannot be read and is left out" in page
    assert "Confusion matrices of 3 classes" in page


def test_printed_result(folder: Path, fitted: Path) -> None:
    done = run("fit", folder, *OPTIONS, "--output", fitted)
    assert done.exit_code == 0
    assert f"already finished: {fitted}" in done.stdout
    assert "accuracy on 6 held-out images" in done.stdout
    result = read_fit(fitted)
    assert result.comparison is not None
    for accuracy in (result.comparison.method, result.comparison.zero_shot):
        low, high = accuracy.interval
        assert (
            f"{accuracy.title:<14}  {100 * accuracy.fraction:5.1f}  ({100 * low:.1f} to {100 * high:.1f})"
            in done.stdout
        )
    assert (
        result.comparison.fixed - result.comparison.regressed
        == result.comparison.method.right - result.comparison.zero_shot.right
    )
    assert f"maple predict {fitted} image.jpg" in done.stdout
    printed = json.loads(run("fit", folder, *OPTIONS, "--output", fitted, "--json").stdout)
    assert printed["method"]["right"] == result.comparison.method.right
    assert printed["versus"]["mended"] == result.comparison.fixed


def test_a_finished_fit_computes_nothing(folder: Path, fitted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("open_backbone", "inspect_dataset", "train_run", "evaluate_run"):
        monkeypatch.delattr(workflow, name)
    before = {path: path.stat().st_mtime_ns for path in fitted.rglob("*")}
    result = fit(settings_for(folder), fitted, device="cpu")
    assert result.was_finished
    assert {path: path.stat().st_mtime_ns for path in fitted.rglob("*")} == before
    moved = folder.rename(folder.with_name("moved"))
    try:
        assert read_fit(fitted).accuracy is not None
        monkeypatch.chdir(folder.parent)
        for source in (folder, folder.name):
            assert f"already finished: {fitted}" in run("fit", source, *OPTIONS, "--output", fitted).stdout
    finally:
        moved.rename(folder)


def test_a_damaged_result_is_not_shown_as_finished(folder: Path, fitted: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(fitted, damaged)
    (damaged / "prompts.safetensors").write_bytes((fitted / "prompts.safetensors").read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"not a readable prompts file.*; remove the file and repeat"):
        fit(settings_for(folder), damaged, device="cpu")


def test_repeated_or_nested_names_in_a_json_file_are_refused(folder: Path, tmp_path: Path) -> None:
    words = tmp_path / "names.json"
    for content, message in (
        ('{"cat": "a", "dog": "b", "cat": "c"}', "names 'cat' more than once"),
        ("[" * 100_000, "nested more than 100 levels deep"),
    ):
        words.write_text(content)
        with pytest.raises(ConfigError, match=message):
            run("fit", folder, "--class-names", words, "--check")


def test_other_commands_use_the_same_held_out_images(folder: Path, fitted: Path, tmp_path: Path) -> None:
    before = read_rows(fitted)
    scores, row = evaluate_run(fitted, device="cpu")
    assert read_rows(fitted) == before
    assert (row["items"], scores.images) == (before[0]["items"], 6)
    for number in range(3):
        for name in ("cat", "dog"):
            (tmp_path / "others" / name).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (30, 30), (60 * number, 9, 9)).save(tmp_path / "others" / name / f"{number}.png")
    scores, _ = evaluate_run(fitted, dataset=str(tmp_path / "others"), device="cpu")
    assert scores.images == 6
    assert read_fit(fitted).comparison is not None
    assert run("predict", fitted, folder / "dog", "--json", "--device", "cpu").exit_code == 0


def test_check_writes_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = run("fit", folder, "--check")
    assert done.exit_code == 0
    assert "pets: 24 images of 3 classes (8 each): 18 to learn from, 6 to test on" in done.stdout
    assert "warning: 1 file cannot be read and is left out" in done.stdout
    assert json.loads(run("fit", folder, "--check", "--json").stdout)["images"] == 25
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["maple", "linear_probe", "promptsrc"])
def test_check_refuses_names_that_fit_refuses(folder: Path, tmp_path: Path, method: str) -> None:
    words = tmp_path / "names.json"
    for name, is_refused in (("長" * 40, True), ("word " * 40, False)):
        words.write_text(json.dumps({"red_owl": name}))
        options = ["--class-names", str(words), "--method", method, "--backbone", "maple-small"]
        done = CliRunner().invoke(app, ["fit", str(folder), "--check", *options])
        assert "1 class name, " in done.stdout, "what was found is shown first"
        message = "tokens, but this CLIP reads at most 77; shorten the class name"
        assert (message in str(done.exception)) == is_refused


class _Interrupts(FitProgress):
    """Raises KeyboardInterrupt at the given call of one of the methods."""

    def __init__(self, method: str, call: int) -> None:
        self.calls = 0

        def count(*_: object) -> None:
            self.calls += 1
            if self.calls == call:
                raise KeyboardInterrupt

        setattr(self, method, count)


@pytest.mark.parametrize(("method", "call"), [("step", 1), ("step", 4), ("evaluating", 1), ("evaluating", 2)])
def test_an_interrupted_fit_is_resumed_to_the_same_result(
    method: str, call: int, folder: Path, fitted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_for(folder)
    with pytest.raises(KeyboardInterrupt):
        fit(settings, tmp_path / "run", device="cpu", progress=_Interrupts(method, call))
    monkeypatch.delattr(workflow, "inspect_dataset")
    result = fit(settings, tmp_path / "run", device="cpu")
    assert not result.was_finished
    assert result.accuracy == read_fit(fitted).accuracy
    assert (tmp_path / "run/prompts.safetensors").read_bytes() == (fitted / "prompts.safetensors").read_bytes()


def test_other_settings_need_another_folder(folder: Path, fitted: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"another `maple fit`|other settings \(seed: 1 there, 2 now\)"):
        fit(settings_for(folder, seed=2), fitted, device="cpu")
    assert fit_folder(settings_for(folder)) == fit_folder(settings_for(folder))
    assert fit_folder(settings_for(folder)) != fit_folder(settings_for(folder, seed=2))
    (tmp_path / "taken").write_text("x")
    with pytest.raises(ConfigError, match="is a file"):
        fit(settings_for(folder), tmp_path / "taken", device="cpu")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/resume.safetensors").touch()
    with pytest.raises(ConfigError, match="a run that `maple fit` did not make"):
        fit(settings_for(folder), tmp_path / "foreign", device="cpu")
    with pytest.raises(CheckpointError, match="is not a run folder"):
        read_fit(tmp_path / "foreign")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        *(
            (name, "[1]", f"did not make and would replace: {name}; choose another")
            for name in ("items.json", "images.json")
        ),
        *(
            (name, "x", f"would replace: {name};")
            for name in ("report.html", "environment.json", "trained_images.json")
        ),
        ("data.json", '{"mine": 1}', "data.json is not a file of `maple fit`; choose another output"),
    ],
)
def test_files_of_the_user_are_not_replaced(
    name: str, content: str, message: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(workflow, "inspect_dataset")
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=message):
        fit(settings_for(folder), tmp_path, device="cpu")
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == content


def test_a_folder_of_runs_is_not_a_run(folder: Path, tmp_path: Path) -> None:
    settings = complete(settings_for(folder))
    for name in ("zero_shot", ".hidden", "first"):
        refuse_other_run(settings, tmp_path)
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(settings.model_dump_json())
    (tmp_path / "a_model").mkdir()
    (tmp_path / "a_model/config.json").write_text('{"hidden_size": 768}')
    with pytest.raises(ConfigError, match="holds other runs, such as first; choose another output, or a folder in"):
        refuse_other_run(settings, tmp_path)


def test_a_fit_that_has_not_begun_may_be_changed(folder: Path, tmp_path: Path) -> None:
    """Two images of each class train and test a named method, but none can be chosen on one of them."""
    for name in ("cat", "dog"):
        (tmp_path / "two" / name).mkdir(parents=True)
        for number in range(2):
            shutil.copy(folder / name / f"{number}.png", tmp_path / "two" / name)
    output, source = tmp_path / "run", str(tmp_path / "two")
    several = fit_candidates(source, ["zero_shot", "taskres"], layer=TINY)
    with pytest.raises(ConfigError, match=r"no class has more than one training image \(a quarter of each class"):
        fit(several, output, device="cpu")
    assert not (output / "data.json").exists()
    with pytest.raises(KeyboardInterrupt):
        fit(settings_for(tmp_path / "two", seed=3), output, device="cpu", progress=_Interrupts("inspected", 1))
    result = fit(settings_for(tmp_path / "two"), output, device="cpu")
    assert result.accuracy is not None
    with pytest.raises(
        ConfigError, match=r"other settings \(it was given one method; now several are to be compared\)"
    ):
        fit(several, output, device="cpu")


def test_a_damaged_folder_is_reported(folder: Path, tmp_path: Path) -> None:
    settings = settings_for(folder)
    fit(settings, tmp_path / "run", device="cpu")
    for name, message in (("data.json", "remove .* to start again"), ("images.json", "images.json")):
        kept = (tmp_path / "run" / name).read_text()
        for damaged in ("", "[]", "{}", kept[:40]):
            (tmp_path / "run" / name).write_text(damaged)
            with pytest.raises(MapleError, match=message):
                fit(settings, tmp_path / "run", device="cpu")
        (tmp_path / "run" / name).write_text(kept)
    for file in (tmp_path / "run/predictions").iterdir():
        file.write_bytes(b"x")
    with pytest.raises(CheckpointError, match="its predictions cannot be compared"):
        read_fit(tmp_path / "run")


def test_methods_that_select_hyperparameters_get_validation_images(folder: Path, tmp_path: Path) -> None:
    result = fit(settings_for(folder, "tip_adapter"), tmp_path / "run", device="cpu")
    listed = read_saved_split(tmp_path / "run" / SAVED_SPLIT)
    assert (len(listed.train), len(listed.val), len(listed.test)) == (12, 6, 6)
    assert result.comparison is not None
    assert "6 to choose settings on" in result.findings[0]


def test_zero_shot_and_too_few_images(folder: Path, tmp_path: Path) -> None:
    result = fit(settings_for(folder, "zero_shot"), tmp_path / "zero", device="cpu")
    assert result.accuracy is not None
    assert result.comparison is None
    assert not (tmp_path / "zero/zero_shot").exists()
    for name in ("cat", "dog"):
        (tmp_path / "few" / name).mkdir(parents=True)
        (tmp_path / "few" / name / "a.png").write_bytes((folder / name / "0.png").read_bytes())
    for finished in (False, True):
        result = fit(settings_for(tmp_path / "few"), tmp_path / "run", device="cpu")
        assert (result.accuracy, result.page, result.was_finished) == (None, None, finished)
    done = run("fit", tmp_path / "few", *OPTIONS, "--output", tmp_path / "run")
    assert "trained, but not tested" in done.stdout


def test_errors_are_raised_before_the_images_are_inspected(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(workflow, "inspect_dataset")

    def offline(*_: object, **__: object) -> None:
        raise BackboneDownloadError("the weights of ViT-B-16 / openai cannot be downloaded: no network")

    with monkeypatch.context() as patched:
        patched.setattr(workflow, "open_backbone", offline)
        with pytest.raises(
            BackboneDownloadError,
            match=r"cannot be downloaded.*To try it without any download, .* maple-small",
        ):
            fit(settings_for(folder), tmp_path / "run", device="cpu")
    deep = fit_settings(str(folder), "vpt", layer=TINY, overrides=["method.vision_prompt_depth=99"])
    with pytest.raises(ConfigError, match="depth=99, but the image tower has 4 blocks"):
        fit(deep, tmp_path / "run", device="cpu")
    with pytest.raises(DataError, match="there is no such folder"):
        fit(settings_for(tmp_path / "nosuch"), tmp_path / "run", device="cpu")
    with pytest.raises(DataError, match="class_names renames 'horse'"):
        inspect_source(str(folder), class_names={"horse": "pony"})
    assert not (tmp_path / "run").exists()


def test_names_and_a_table(folder: Path, tmp_path: Path) -> None:
    rows = [f"{name}/{number}.png,{name}" for name in ("cat", "dog") for number in range(8)]
    (folder / "table.csv").write_text("path,label\n" + "\n".join(rows) + "\n")
    (tmp_path / "names.json").write_text('{"cat": "tabby"}')
    try:
        done = run(
            *("fit", folder / "table.csv", *OPTIONS, "--class-names", tmp_path / "names.json"),
            *("--output", tmp_path / "run"),
        )
    finally:
        (folder / "table.csv").unlink()
    assert done.exit_code == 0, done.output
    assert read_saved_split(tmp_path / "run" / SAVED_SPLIT).class_names == ("tabby", "dog")
    assert read_fit(tmp_path / "run").comparison is not None


def test_a_saved_split_of_rendered_images(tmp_path: Path) -> None:
    """The bundled emoji have no files: they are rendered again."""
    whole = load_dataset("emoji-flags/noto", None)
    written = write_saved_split(tmp_path / SAVED_SPLIT, replace(whole, test=whole.test[:3]), "emoji-flags/noto")
    listed = read_saved_split(tmp_path / SAVED_SPLIT, written)
    assert listed.test == whole.test[:3]
    assert listed.store().get(listed.test[0].path).tobytes() == whole.store().get(whole.test[0].path).tobytes()


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs SIGINT")
def test_ctrl_c(folder: Path, tmp_path: Path) -> None:
    """Stops cleanly, and the same command resumes."""
    process = start_maple("fit", folder, *OPTIONS, "--set", "train.epochs=400", "--output", tmp_path / "run")
    limit = time.monotonic() + 100
    while not (tmp_path / "run/metrics.jsonl").exists() and process.returncode is None and time.monotonic() < limit:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130, process.stderr
    assert process.stderr.rstrip().endswith("maple: interrupted; repeat the command to resume where it stopped")
    assert "Traceback" not in process.stderr
    assert (tmp_path / "run/resume.safetensors").exists()


# --- the run folder


def test_a_run_among_the_images_is_refused(folder: Path) -> None:
    for place in (folder, folder / "runs" / "first", folder / "cat"):
        with pytest.raises(ConfigError, match=r"is among the images of .*; choose another output"):
            fit(settings_for(folder), place, device="cpu")
    assert sorted(child.name for child in folder.iterdir()) == ["cat", "dog", "red_owl"]


def test_a_full_disk_is_one_line(folder: Path, tmp_path: Path) -> None:
    """The disk is full while a library writes the prompts; later there is space again."""
    done = run_maple("fit", folder, *OPTIONS, "--output", tmp_path / "run", largest_file=20)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == f"maple: {tmp_path}/run/resume.safetensors: File too large"
    again = run("fit", folder, *OPTIONS, "--output", tmp_path / "run")
    assert again.exit_code == 0


def test_an_impossible_name_is_one_line(folder: Path, tmp_path: Path) -> None:
    done = run_maple("fit", folder, *OPTIONS, "--output", tmp_path / ("a" * 300))
    assert done.returncode == 2
    assert done.stderr.rstrip().endswith(": File name too long")
    assert "Traceback" not in done.stderr


def test_class_names_file_with_a_byte_order_mark(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "names.json").write_text('{"red_owl": "scarlet owl"}', encoding="utf-8-sig")
    done = run("fit", folder, "--check", "--json", "--class-names", tmp_path / "names.json")
    assert [entry["name"] for entry in json.loads(done.stdout)["classes"]] == ["cat", "dog", "scarlet owl"]
