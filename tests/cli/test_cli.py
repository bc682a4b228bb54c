"""The commands as a user types them, on a small folder of real image files."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import run_maple, start_maple
from PIL import Image
from typer.testing import CliRunner

import maple
from maple.checkpoint import load_prompts, put_parameters, read_prompts
from maple.cli import app, main
from maple.clip import load_clip
from maple.config import RunSettings, preset_of
from maple.errors import CheckpointError, ClassNamesError, ConfigError, DataError, MapleError
from maple.methods import METHODS, build_method
from maple.runs import read_settings

TINY = ["--backbone", "maple-tiny", "--pretrained", "random:1", "--device", "cpu"]
QUICK = ["--set", "method.prompt_depth=2", "--set", "train.epochs=2", "--shots", "4"]
COLOURS = {"red_thing": (200, 30, 30), "green thing": (30, 180, 30), "blue thing": (30, 30, 200)}


def run(*arguments: object) -> str:
    """Run a command that must succeed; return its output."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    for name, colour in COLOURS.items():
        (root / name).mkdir()
        for number in range(8):
            shade = tuple(min(255, value + 5 * number) for value in colour)
            Image.new("RGB", (40, 30), shade).save(root / name / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def trained(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "run"
    run("train", "--dataset", folder, *TINY, *QUICK, "--output", output)
    return output


def rows_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from maple.cli import app; from typer.testing import CliRunner;"
        "assert 'evaluate' in CliRunner().invoke(app, ['--help']).output;"
        "print(sorted({'torch', 'open_clip', 'pydantic', 'PIL', 'accelerate', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_train_writes_a_run(trained: Path) -> None:
    names = {path.name for path in trained.iterdir()}
    assert {"config.json", "items.json", "environment.json", "metrics.jsonl", "prompts.safetensors"} <= names
    assert "resume.safetensors" not in names
    assert len((trained / "metrics.jsonl").read_text().splitlines()) == 2
    assert len(json.loads((trained / "items.json").read_text())["items"]) == 12


def test_finished_run_is_not_repeated(folder: Path, trained: Path) -> None:
    before = (trained / "prompts.safetensors").stat().st_mtime_ns
    assert "already finished" in run("train", "--dataset", folder, *TINY, *QUICK, "--output", trained)
    assert (trained / "prompts.safetensors").stat().st_mtime_ns == before


def test_other_settings_need_another_folder(folder: Path, trained: Path) -> None:
    with pytest.raises(MapleError, match=r"other settings .*seed.*another output"):
        run("train", "--dataset", folder, *TINY, *QUICK, "--output", trained, "--seed", "2")


def test_evaluate_parts_and_names(trained: Path) -> None:
    rows = rows_of(run("evaluate", trained, "--classes", "all,base,novel", "--json", "--device", "cpu"))
    assert [(row["classes"], row["images"], len(row["class_names"])) for row in rows] == [
        ("all", 6, 3),
        ("base", 4, 2),
        ("novel", 2, 1),
    ]
    assert rows[2]["top1"] == 1
    (row,) = rows_of(run("evaluate", trained, "--names", "sky, grass, rose", "--json"))
    assert row["class_names"] == ["sky", "grass", "rose"]
    (row,) = rows_of(run("evaluate", trained, "--only", "red_thing,blue thing", "--json"))
    assert (row["images"], row["class_names"]) == (4, ["blue thing", "red_thing"])
    assert "harmonic mean" in run("evaluate", trained, "--classes", "base,novel", "--per-class", "--confusion")


def test_unsupported_classes_are_shown_as_a_dash(folder: Path, tmp_path: Path) -> None:
    prompts = ["--method", "coop", "--set", "method.class_specific=true", "--set", "train.epochs=1"]
    run("train", "--dataset", folder, "--classes", "base", *TINY, *prompts, "--output", tmp_path / "run")
    result = CliRunner().invoke(app, ["evaluate", str(tmp_path / "run"), "--classes", "base,novel", "--device", "cpu"])
    assert result.exit_code == 0
    assert "novel: - (class-specific prompts were learned for 2 classes, and" in result.stderr
    assert "base" in result.stdout
    assert "novel" not in result.stdout
    with pytest.raises(MapleError, match="were learned for 2 classes"):
        run("evaluate", tmp_path / "run", "--classes", "novel", "--device", "cpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--classes", "old"], "'all', 'base' or 'novel'"),
        (["--part", "dev"], "unknown part 'dev'"),
        (["--names", "one"], "1 names were given for 3 classes"),
        (["--only", "teapot"], "no class is called 'teapot'; there are: "),
        (["--dataset", "eurosatt"], "unknown data set 'eurosatt'"),
    ],
)
def test_evaluate_errors(trained: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(MapleError) as caught:
        run("evaluate", trained, *arguments)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "mapel"], "unknown method 'mapel'; choose one of: zero_shot, coop"),
        (["--preset", "nope"], "unknown preset 'nope'; choose one of: "),
        (["--set", "train.lrr=1"], "unknown setting 'train.lrr'"),
        (["--set", "train.lr"], "section.key=value"),
        (["--set", "train.lr=-1"], "train.lr = -1"),
        (["--set", "method.prompt_depth=40"], "prompt_depth=40"),
        (["--shots", "0"], "--shots '0'"),
        (["--precision", "fp8"], "backbone.precision"),
        (["--set", "train.crop_scale=[0.9, 0.1]"], "the smaller fraction comes first"),
        (["--device", "foo"], "there is no device 'foo'; choose one of: cpu"),
        (["--backbone", "ViT-Z"], "unknown CLIP 'ViT-Z'"),
    ],
)
def test_train_errors(folder: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    base = [] if "--backbone" in arguments else TINY[:2]
    with pytest.raises(MapleError) as caught:
        run("train", "--dataset", folder, *base, "--output", tmp_path / "run", *arguments)
    assert message in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("output", "message"), [("", "current folder"), ("x" * 300, "cannot be a folder")])
def test_bad_outputs(folder: Path, output: str, message: str) -> None:
    with pytest.raises(MapleError, match=message):
        run("train", "--dataset", folder, *TINY[:4], "--output", output)


def test_a_run_that_learned_nothing_may_be_corrected(folder: Path, tmp_path: Path) -> None:
    """A broken image stops the first attempt after its files are written; the corrected command is not refused."""
    images = tmp_path / "images"
    shutil.copytree(folder, images)
    for path in images.rglob("*.png"):
        path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(MapleError, match=r"\.png: "):
        run("train", "--dataset", images, *TINY, *QUICK, "--output", tmp_path / "run")
    assert (tmp_path / "run" / "config.json").exists()
    run("train", "--dataset", folder, *TINY, *QUICK, "--output", tmp_path / "run")
    settings = json.loads((tmp_path / "run" / "config.json").read_text())
    assert settings["data"]["dataset"] == str(folder.resolve())


def test_names_are_shown_as_they_are(trained: Path) -> None:
    """Square brackets are markup for rich."""
    text = run("evaluate", trained, "--names", "[/red],dog[bold],cat", "--per-class", "--device", "cpu")
    assert "[/red]" in text
    assert "dog[bold]" in text


def test_folder_names_that_are_not_unicode(tmp_path: Path) -> None:
    """As old archives have them; through `main`, which must be able to print them, too."""
    for name in (b"caf\xe9", b"tea"):
        folder = os.fsencode(tmp_path / "images") + b"/" + name
        os.makedirs(folder)
        for number in range(4):
            Image.new("RGB", (20, 20), (9 * number, 0, 0)).save(os.fsdecode(folder) + f"/{number}.png")
    output = tmp_path / "run"
    done = run_maple("train", "--dataset", tmp_path / "images", *TINY, *QUICK, "--output", output)
    assert done.returncode == 0, done.stderr
    shown = run_maple("evaluate", output, "--per-class")
    assert shown.returncode == 0, shown.stderr
    assert "tea" in shown.stdout


def test_another_folder_is_evaluated_whole(trained: Path, folder: Path, tmp_path: Path) -> None:
    """But for the 12 images that the run was trained on; a folder with a split of its own keeps its test part."""
    shutil.copytree(folder, tmp_path / "other")
    (row,) = rows_of(run("evaluate", trained, "--dataset", tmp_path / "other", "--json", "--device", "cpu"))
    assert (row["part"], row["images"]) == ("all", 12)
    shutil.copytree(folder, tmp_path / "divided" / "train")
    shutil.copytree(folder, tmp_path / "divided" / "test")
    (row,) = rows_of(run("evaluate", trained, "--dataset", tmp_path / "divided", "--json", "--device", "cpu"))
    assert (row["part"], row["images"]) == ("test", 12)
    (row,) = rows_of(run("evaluate", trained, "--dataset", folder, "--json", "--device", "cpu"))
    assert (row["part"], row["images"]) == ("test", 6)


def test_the_same_folder_under_another_path_keeps_its_class_names(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = tmp_path / "names.json"
    names.write_text('{"red_thing": "rose"}')
    run("train", "--dataset", folder, *TINY, *QUICK, "--class-names", names, "--output", tmp_path / "run")
    monkeypatch.chdir(folder.parent)
    arguments = ["--dataset", f"./{folder.name}", "--json", "--device", "cpu"]
    (row,) = rows_of(run("evaluate", tmp_path / "run", *arguments))
    assert (row["part"], row["class_names"]) == ("test", ["blue thing", "green thing", "rose"])


def test_a_backbone_given_by_a_relative_path_works_from_any_folder_and_may_move(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    clip, home = tmp_path / "clips" / "mine", tmp_path / "elsewhere"
    with resources.as_file(resources.files("maple").joinpath("assets", "small_clip")) as packaged:
        shutil.copytree(packaged, clip)
    home.mkdir()
    monkeypatch.chdir(tmp_path)
    coop = ["--method", "coop", "--shots", "2", "--set", "train.epochs=1"]
    run("train", "--dataset", folder, "--backbone", "clips/mine", *coop, "--output", "run")
    monkeypatch.chdir(home)
    evaluate = ["evaluate", "../run", "--json", "--device", "cpu"]
    before = rows_of(run(*evaluate))
    prompts = load_prompts("../run/prompts.safetensors")
    assert prompts.backbone.name == str(clip)
    clip.rename(tmp_path / "moved")
    with pytest.raises(MapleError, match=r"names the CLIP .*mine', which does not exist here; name your own copy"):
        run(*evaluate)
    again = rows_of(run(*evaluate, "--backbone", "../moved"))
    assert [row["top1"] for row in again] == [row["top1"] for row in before]
    assert run("predict", "../run", folder / "red_thing" / "1.png", "--backbone", "../moved", "--device", "cpu")
    with pytest.raises(CheckpointError, match="prompts do not work with other weights"):
        run(*evaluate, "--backbone", "maple-tiny", "--pretrained", "random:1")


def test_a_folder_named_like_a_published_data_set_is_a_folder(trained: Path, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "eurosat")
    (row,) = rows_of(run("evaluate", trained, "--dataset", tmp_path / "eurosat", "--json", "--device", "cpu"))
    assert (row["part"], row["images"]) == ("all", 12)


def test_a_deleted_working_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    command = f"cd {tmp_path}/gone && rmdir ../gone && {sys.executable} -m maple methods"
    environment = {**os.environ, "PYTHONPATH": str(Path(maple.__file__).parents[1])}
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 2
    assert done.stderr.strip() == "maple: the working folder has been deleted; change to another folder"


def test_main_prints_one_line(tmp_path: Path) -> None:
    done = run_maple("evaluate", tmp_path)
    assert done.returncode == 2
    assert done.stderr.strip() == f"maple: {tmp_path} is not a run folder: it has no config.json"


def test_an_interruption_is_reported_and_resumed(folder: Path, tmp_path: Path) -> None:
    arguments = ["--dataset", folder, *TINY, *QUICK, "--set", "train.epochs=2000", "--output", tmp_path / "run"]
    process, deadline = start_maple("train", *arguments), time.monotonic() + 120
    while "epoch 2/" not in process.stderr and process.returncode is None and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130, process.stderr
    assert "maple: interrupted; repeat the command" in process.stderr
    assert "Traceback" not in process.stderr
    assert (tmp_path / "run" / "resume.safetensors").exists()


def test_print_config(folder: Path) -> None:
    arguments = ["--dataset", folder, "--method", "coop", "--set", "train.lr=0.01", "--seed", "0", "--print-config"]
    settings = tomllib.loads(run("train", *arguments))
    assert settings["method"]["name"] == "coop"
    assert (settings["train"]["lr"], settings["train"]["epochs"], settings["seed"]) == (0.01, 200, 0)


def test_zero_shot_uses_the_data_sets_template() -> None:
    settings = tomllib.loads(run("train", "--dataset", "eurosat", "--method", "zero_shot", "--print-config"))
    assert settings["method"]["templates"] == ["a centered satellite photo of {}."]


@pytest.mark.parametrize("method", METHODS)
def test_printed_settings_are_a_preset(method: str, folder: Path, tmp_path: Path) -> None:
    arguments = ["--dataset", folder, "--preset", preset_of(method, ["few-shot", "base-to-novel"]), "--shots", "all"]
    printed = run("train", *arguments, "--set", "train.workers=0", "--print-config")
    file = tmp_path / "mine.toml"
    file.write_text(printed)
    assert run("train", file, "--print-config") == printed
    assert run("train", "--preset", file, "--print-config") == printed
    file.with_suffix(".json").write_text(json.dumps(tomllib.loads(printed)))
    assert run("train", file.with_suffix(".json"), "--print-config") == printed


def test_the_settings_of_a_run_are_a_preset(trained: Path, folder: Path) -> None:
    printed = run("train", trained, "--print-config")
    assert run("train", trained / "config.json", "--print-config") == printed
    settings = read_settings(trained)
    assert settings == RunSettings(**tomllib.loads(printed))
    other = tomllib.loads(run("fit", folder, "--preset", trained, "--print-config"))
    assert (other["method"], other["train"]["lr"]) == (settings.method, settings.train.lr)


def test_settings_that_cannot_be_read(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{")
    for arguments, message in (
        ([trained, "--preset", "coop_few-shot"], "both have the settings; leave out one"),
        ([tmp_path], "is not a run folder: it has no config.json"),
        ([tmp_path / "broken.json"], "broken.json"),
        ([tmp_path / "missing.toml"], "or the path of a TOML file"),
    ):
        outcome = CliRunner().invoke(app, ["train", *map(str, arguments), "--print-config"])
        assert isinstance(outcome.exception, ConfigError), arguments
        assert message in str(outcome.exception)


def test_inspect_names_the_runs_of_a_sweep(trained: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        shutil.copytree(trained, tmp_path / "runs" / name)
    done = CliRunner().invoke(app, ["inspect", str(tmp_path / "runs")])
    assert isinstance(done.exception, CheckpointError)
    assert str(done.exception).endswith("is not a run folder, but holds 2 runs: first, second")


def test_inspect(trained: Path) -> None:
    run("evaluate", trained, "--classes", "all", "--device", "cpu")
    text = run("inspect", trained)
    assert "finished" in text
    assert "text_prompt.0 [2, 128]" in text
    content = json.loads(run("inspect", trained, "--json"))
    assert content["prompts"]["class_names"] == ["blue thing", "green thing", "red_thing"]
    assert [epoch["lr"] for epoch in content["epochs"]] == [1e-5, 0.0035]
    assert content["rows"]
    assert "3 classes" in run("inspect", trained / "prompts.safetensors")


def test_methods() -> None:
    text = run("methods", "--backbone", "maple-tiny")
    assert all(name in text for name in ("zero_shot", "coop", "cocoop", "deep_language", "vpt", "independent_vl"))
    assert "25,024" in text


def test_import(trained: Path, folder: Path, tmp_path: Path) -> None:
    """The learned prompts, written as the reference writes them, come back as the same classifier."""
    stored = read_prompts(trained / "prompts.safetensors")
    names = {
        "text_prompt.0": "ctx",
        "text_prompt.1": "compound_prompts_text.0",
        "coupling.0.weight": "proj.weight",
        "coupling.0.bias": "proj.bias",
        "coupling.1.weight": "compound_prompt_projections.0.weight",
        "coupling.1.bias": "compound_prompt_projections.0.bias",
    }
    state = {f"prompt_learner.{names[name]}": tensor for name, tensor in stored.tensors.items()}
    file = tmp_path / "model.pth.tar-2"
    torch.save({"state_dict": state, "epoch": 2}, file)
    backbone = TINY[:4]
    with pytest.raises(MapleError, match="does not contain its class names"):
        run("import", file, *backbone)
    run("import", file, *backbone, "--dataset", folder, "--classes", "all", "--output", tmp_path / "run")
    images = torch.randn(2, 3, 64, 64)
    first, second = (load_prompts(place / "prompts.safetensors") for place in (trained, tmp_path / "run"))
    assert torch.equal(first.predict_logits(images), second.predict_logits(images))
    (row,) = rows_of(run("evaluate", tmp_path / "run", "--json"))
    assert row["images"] == 6


def test_an_import_takes_from_the_preset_what_the_file_does_not_say(tmp_path: Path) -> None:
    """TCP's sentence of a data set; `--set` changes it."""
    method = build_method({"name": "tcp", "class_prompt_layer": 1}, load_clip(*TINY[1:4:2]), ["cat", "dog"])
    names = {"text_prompt.0": "ctx"} | {
        f"meta_net.{number}.{part}": f"meta_net.linear{number + 1}.{part}"
        for number in (0, 1)
        for part in ("weight", "bias")
    }
    file = tmp_path / "model.pth.tar-50"
    torch.save({names[name]: tensor for name, tensor in method.prompt_parameters().items()}, file)
    known = ("--dataset", "oxford_pets", "--names", "cat,dog", "--set", "method.class_prompt_layer=1")
    run("import", file, *TINY[:4], *known, "--output", tmp_path / "run")
    settings = read_settings(tmp_path / "run").method
    assert settings["template"] == "X X X X {}, a type of pet."
    assert settings["teacher_template"] == "a photo of a {}, a type of pet."
    assert settings["class_prompt_layer"] == 1
    images = torch.randn(2, 3, 64, 64)
    same = build_method(settings, method.backbone, ["cat", "dog"])
    put_parameters(same, dict(method.prompt_parameters()), source="test")
    with torch.no_grad():
        torch.testing.assert_close(
            load_prompts(tmp_path / "run" / "prompts.safetensors").predict_logits(images), same.predict_logits(images)
        )


def test_an_import_has_the_shots_and_the_seed_of_the_published_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three seeds are three runs; without a data set none is recorded."""
    monkeypatch.chdir(tmp_path)
    known = (*TINY[:4], "--names", "cat,dog")
    for folder in ("shots_4/MaPLe/vit_b16/seed3", "CoOp/rn50_4shots/seed2", "elsewhere"):
        Path(folder).mkdir(parents=True)
        torch.save({"ctx": torch.zeros(4, 128)}, f"{folder}/model.pth.tar-5")
        assert "classes, " in run("import", f"{folder}/model.pth.tar-5", *known)
    given = ("--shots", "all", "--seed", "0")
    run("import", "elsewhere/model.pth.tar-5", *known, *given, "--set", "seed=7", "--output", "given")
    found = {folder.name: read_settings(folder) for folder in [*Path("runs").iterdir(), Path("given")]}
    assert {(settings.data.shots, settings.seed) for settings in found.values()} == {(4, 3), (4, 2), (16, 1), (None, 7)}
    assert {settings.data.dataset for settings in found.values()} == {""}
    assert any(name.startswith("imported_model.pth.tar-5_data_coop_base_4shots_seed3_") for name in found)
    with pytest.raises(DataError, match="no data set is named"):
        run("evaluate", "given")


@pytest.fixture
def coop_file(tmp_path: Path) -> Path:
    """A checkpoint of CoOp on the tiny CLIP for "cat" and "red dog", with the embeddings of their sentences."""
    backbone = load_clip(*TINY[1:4:2])
    states = backbone.text.embed(backbone.tokenize(["X X X X cat.", "X X X X red dog."])).half()
    file = tmp_path / "CoOp/tiny_4shots/nctx4_cscFalse_ctpmiddle/seed1/model.pth.tar-5"
    file.parent.mkdir(parents=True)
    torch.save({"ctx": torch.zeros(4, 128), "token_prefix": states[:, :1], "token_suffix": states[:, 5:]}, file)
    return file


def test_an_import_on_another_backbone_than_the_files_is_reported(coop_file: Path, tmp_path: Path) -> None:
    known = ("--backbone", "maple-tiny", "--names", "cat,red_dog", "--output")
    output = run("import", coop_file, "--pretrained", "random:2", *known, tmp_path / "other")
    assert "the file was trained on another CLIP than maple-tiny, which has other values of the embedding" in output
    output = run("import", coop_file, "--pretrained", "random:1", *known, tmp_path / "same")
    assert "another CLIP" not in output
    assert "other class names" not in output


def test_an_import_with_another_number_of_names_or_other_names_is_reported(
    coop_file: Path, folder: Path, tmp_path: Path
) -> None:
    output = run("import", coop_file, *TINY[:4], "--names", "cat,dog,eel", "--output", tmp_path / "three")
    assert "was trained on 2 classes, and --names has 3, which" in output
    output = run("import", coop_file, *TINY[:4], "--dataset", folder, "--classes", "all", "--output", tmp_path / "all")
    assert f"was trained on 2 classes, and --classes all of {folder} are 3, which" in output
    output = run("import", coop_file, *TINY[:4], "--names", "red_dog,cat", "--output", tmp_path / "run")
    assert "other class names than red_dog, cat, or in another order" in output


def test_an_import_has_the_class_token_position_of_the_published_folder(coop_file: Path, tmp_path: Path) -> None:
    known = (*TINY[:4], "--names", "cat,red_dog", "--output")
    assert "taken to follow" not in run("import", coop_file, *known, tmp_path / "middle")
    front = ("--set", "method.class_token_position=front")
    run("import", coop_file, *known, tmp_path / "front", *front)
    shutil.copy(coop_file, tmp_path)
    assert "taken to follow the prompt" in run("import", tmp_path / coop_file.name, *known, tmp_path / "end")
    assert "taken to follow" not in run("import", tmp_path / coop_file.name, *known, tmp_path / "other", *front)
    found = [read_settings(tmp_path / name).method["class_token_position"] for name in ("middle", "front", "end")]
    assert found == ["middle", "front", "end"]


def test_an_import_from_imagenet_with_all_classes_has_the_recipe_of_transfers(tmp_path: Path) -> None:
    settings = {"name": "mmapp", "adapter_start": 2, "adapter_end": 4}
    method = build_method(settings, load_clip(*TINY[1:4:2]), ["cat", "dog"])

    def published(name: str) -> str:
        adapter, block, *parts = name.split(".")
        inner = ["0", *parts] if adapter == "shared_adapter" else ["down.0" if p == "down" else p for p in parts]
        return ".".join([adapter.replace("vision", "visual"), str(int(block) + 1), *inner])

    file = tmp_path / "model.pth.tar-15"
    torch.save({published(name): tensor for name, tensor in method.prompt_parameters().items()}, file)
    known = (*TINY[:4], "--method", "mmapp", "--dataset", "imagenet", "--names", "cat,dog")
    for classes, scale in (("all", 0.005), ("base", 0.0065)):
        run("import", file, *known, "--classes", classes, "--output", tmp_path / classes)
        assert read_settings(tmp_path / classes).method["adapter_test_scale"] == scale


def test_an_import_of_a_head_on_a_base_method_without_a_preset(tmp_path: Path) -> None:
    settings = {"name": "dept", "base_method": "vpt", "vision_prompt_length": 2, "vision_prompt_depth": 1}
    method = build_method(settings, load_clip(*TINY[1:4:2]), ["cat", "dog"])
    names = {"vision_prompt.0": "image_encoder.VPT"} | {
        f"head.{part}": f"linear_probe_proj.{part}" for part in ("weight", "bias")
    }
    names |= {
        f"film_{side}.{part}": f"film_lp_{published}.{part}"
        for side, published in (("image", "img"), ("text", "text"))
        for part in ("scale", "bias")
    }
    file = tmp_path / "model.pth.tar-10"
    torch.save({names[name]: tensor for name, tensor in method.prompt_parameters().items()}, file)
    run("import", file, *TINY[:4], "--names", "cat,dog", "--output", tmp_path / "run")
    assert read_settings(tmp_path / "run").method["base_method"] == "vpt"


def test_an_export_is_not_a_run_folder(tmp_path: Path) -> None:
    for name, hint in (
        ("maple-export.json", "it is an ONNX export, which `maple predict`"),
        ("model.json", "it is an export for other programs"),
    ):
        (tmp_path / name / name).parent.mkdir()
        (tmp_path / name / name).write_text("{}")
        with pytest.raises(CheckpointError, match=hint):
            read_settings(tmp_path / name)
    with pytest.raises(CheckpointError, match="it does not exist"):
        read_settings(tmp_path / "nope")


def test_a_long_sentence_is_shortened_in_the_message() -> None:
    with pytest.raises(ClassNamesError, match=r"\.\.\.' needs 402 tokens, but this CLIP reads at most 77") as caught:
        load_clip("maple-tiny", "random:1").tokenize(["very " * 400])
    assert len(str(caught.value)) < 300


def test_errors_show_the_control_characters_of_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "re\x1b[31md.csv"
    table.write_text("nothing\n")
    monkeypatch.setattr(sys, "argv", ["maple", "data", "show", str(table)])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert "re\\x1b[31md.csv" in capsys.readouterr().err
