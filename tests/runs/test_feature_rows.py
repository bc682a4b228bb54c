"""Precomputed features in fit, predict, sweeps and PromptClassifier, and rows that were trained on."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from feature_tools import settings_of, tensors_of, write_features
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from maple import PromptClassifier, build_method
from maple.cli import app
from maple.clip import Backbone, load_clip
from maple.clip.features import require_features_of
from maple.config import RunSettings
from maple.data import inspect_dataset, load_features
from maple.errors import BackboneError, ConfigError, DataError, UnsupportedTowerError
from maple.feature_files import FeatureRows, read_features
from maple.fitting import FitProgress, FitResult, SelectionSettings, fit, fit_candidates, fit_settings, inspect_source
from maple.inference import load_predictor
from maple.inference.sources.array_images import InputError, to_inputs
from maple.inference.torch_predictor import TorchPredictor
from maple.methods import describe_methods
from maple.report import collect
from maple.report.groups import group_evaluations
from maple.runs import eval_transform, evaluate_run, train_run
from maple.runs.selection_plan import make_plan
from maple.serve.api import create_app
from maple.sweeps import SweepSettings, plan_sweep, run_sweep

Write = Callable[..., str]
RECIPES = ["zero_shot", "tip_adapter", "taskres", "coop"]
QUICK = ["train.epochs=2", "train.warmup_epochs=0"]


def undivided(rows: int = 16) -> dict[str, Tensor]:
    """Rows of four classes, whose text features are so far from them that there is something to learn."""
    tensors = tensors_of(classes=4, rows=rows)
    text = tensors["text"] + 8 * torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    return {"features": tensors["train"], "labels": tensors["train_labels"], "text": text}


def candidates(source: str, recipes: list[str] = RECIPES) -> dict[str, RunSettings]:
    return fit_candidates(source, recipes, layer={"data": {"shots": 4}}, overrides=QUICK)


def maple(*words: object) -> Result:
    return CliRunner().invoke(app, [*map(str, words), "--device", "cpu"], catch_exceptions=False)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[FitResult, str]:
    folder = tmp_path_factory.mktemp("fitted")
    source = write_features(folder / "birds.safetensors", undivided(), backbone="CLIP A", logit_scale="1")
    return fit(candidates(source), folder / "run", device="cpu"), source


# --- fit


def test_a_fit_chooses_among_the_methods_that_accept_features(fitted: tuple[FitResult, str]) -> None:
    result, _ = fitted
    assert result.selection is not None
    assert {each.recipe for each in result.selection.tried} == {"zero_shot", "tip_adapter", "taskres"}
    assert result.selection.chosen.recipe != "zero_shot"
    (skipped,) = (each for each in result.selection.candidates if each.skipped)
    assert skipped.recipe == "coop"
    assert "without a CLIP" in skipped.skipped
    assert result.accuracy is not None
    assert result.accuracy.images == 16, "a quarter of each class is held out"
    assert result.reliability is not None
    assert result.page is not None
    page = result.page.read_text()
    assert "features in place of images: equal rows are found, but not images that look nearly the same" in page
    assert "Not tried: CoOp" in page
    assert not any("class name" in line for line in result.findings), "no CLIP reads the names"


def test_an_interrupted_fit_is_resumed(fitted: tuple[FitResult, str], tmp_path: Path) -> None:
    class Interrupting(FitProgress):
        def trying(self, _title: str, done: int, _total: int) -> None:
            if done == 7:
                raise KeyboardInterrupt

    result, source = fitted
    folder = tmp_path / "again"
    with pytest.raises(KeyboardInterrupt):
        fit(candidates(source), folder, device="cpu", progress=Interrupting())
    again = fit(candidates(source), folder, device="cpu")
    first, second = (
        json.loads((place / "selection.json").read_text())["candidates"] for place in (folder, result.folder)
    )
    assert [entry["scores"] for entry in first] == [entry["scores"] for entry in second]
    assert again.accuracy == result.accuracy
    assert (folder / "prompts.safetensors").read_bytes() == (result.folder / "prompts.safetensors").read_bytes()
    assert fit(candidates(source), folder, device="cpu").was_finished


def test_without_text_features_only_the_linear_probe_is_fitted(write: Write, tmp_path: Path) -> None:
    tensors = undivided()
    del tensors["text"]
    source = write(tensors)
    recipes = candidates(source, ["zero_shot", "taskres", "linear_probe"])
    plan = make_plan(recipes, load_features(source)[0], load_clip(f"features:{source}"), SelectionSettings())
    skipped = {entry["recipe"]: entry["skipped"] for entry in plan["candidates"]}
    assert skipped["linear_probe"] == ""
    assert all("needs text features" in skipped[recipe] for recipe in ("zero_shot", "taskres"))
    settings = fit_settings(source, "linear_probe", layer={"method": {"inverse_regularisation": 1.0}})
    result = fit(settings, tmp_path / "run", device="cpu")
    assert result.accuracy is not None
    assert result.comparison is None
    assert any("no comparison with zero-shot CLIP" in line for line in result.findings)
    assert not (tmp_path / "run" / "zero_shot").exists()
    assert fit(settings, tmp_path / "run", device="cpu").was_finished


def test_equal_rows_are_copies(write: Write) -> None:
    tensors = tensors_of()
    tensors["test"][2] = tensors["train"][2]
    tensors["train"][9] = tensors["train"][3]
    tensors["train"][10] = tensors["train"][5]  # of another class
    dataset, _ = load_features(write(tensors))
    inspection = inspect_dataset(dataset)
    remaining = {item.path for item in (*inspection.dataset.train, *inspection.dataset.test)}
    left_out = {"test/2", "train/9", "train/10", "train/5"}
    assert remaining == {f"{split}/{row}" for split in ("train", "test") for row in range(12)} - left_out
    assert {finding.kind for finding in inspection.findings} >= {"no pixels", "copies", "conflicts"}


def test_rows_of_zeros_and_a_logarithmic_scale_are_reported(write: Write, tmp_path: Path) -> None:
    tensors = tensors_of()
    tensors["train"][3] = 0
    del tensors["test"], tensors["test_labels"]
    source = write(tensors, logit_scale="4.6052")
    inspection = inspect_source(source)
    findings = {finding.kind: finding for finding in inspection.findings}
    assert findings["unreadable"].text == "1 row cannot be used and is left out: train/3 has only zeros"
    assert "train/3" not in {item.path for item in inspection.dataset.train}
    assert findings["logit scale"].text == "logit_scale is 4.61: is this the logarithm? Its exponential is 100"
    assert "logit scale" not in {each.kind for each in inspect_source(write(tensors)).findings}
    done = maple("fit", "--features", source, "--method", "taskres", "--output", tmp_path / "run")
    assert "add test and test_labels, or store undivided features and labels" in done.stdout


def test_fit_on_the_command_line(fitted: tuple[FitResult, str], tmp_path: Path) -> None:
    _, source = fitted
    done = maple(
        "fit", "--features", source, "--method", "taskres", "--set", "train.epochs=1", "--output", tmp_path / "r"
    )
    assert "birds: 64 images of 4 classes (16 each): 48 to learn from, 16 to test on" in done.stderr
    assert "maple predict" in done.stdout
    assert "--features more.safetensors" in done.stdout
    assert maple("fit").exit_code == 2
    with pytest.raises(ConfigError, match="leave out some"):
        maple("fit", "some", "--features", source)
    with pytest.raises(ConfigError, match="need no CLIP"):
        maple("fit", "--features", source, "--backbone", "ViT-B-32")


# --- predict


def test_rows_are_predicted_by_name(fitted: tuple[FitResult, str], write: Write) -> None:
    result, _ = fitted
    rows = tensors_of(classes=4)["test"]
    named = write({"features": rows.half()}, "named", names=json.dumps([f"a {n}.jpg" for n in range(16)]))
    done = maple("predict", result.folder, "--features", named, "--top", 2, "--json", "--reject", 0.5, "--zero-shot")
    predictions = [json.loads(line) for line in done.stdout.splitlines()]
    assert [each["source"] for each in predictions] == [f"a {n}.jpg" for n in range(16)]
    assert all(len(each["best"]) == 2 and "zero_shot" in each for each in predictions)
    assert [each["rejected"] for each in predictions] == [each["best"][0]["probability"] < 0.5 for each in predictions]
    best = [each["best"][0]["class"] for each in predictions]
    assert np.mean([name == f"class {n % 4}" for n, name in enumerate(best)]) > 0.8
    unnamed = write({"test": rows}, "unnamed")
    lines = list(csv.reader(io.StringIO(maple("predict", result.folder, "--features", unnamed, "--csv").stdout)))
    assert [line[0] for line in lines[1::4]] == [f"test/{n}" for n in range(16)]
    classifier = PromptClassifier.from_pretrained(result.folder, device="cpu")
    assert classifier.predict(rows.numpy()).tolist() == best, "half precision changes no answer here"


@pytest.mark.parametrize(
    ("width", "metadata", "message"),
    [
        (4, {}, "other.safetensors has 4 features, and the CLIP of the training 8"),
        (8, {"backbone": "CLIP B"}, "features of 'CLIP B', and the run was trained on features of 'CLIP A'"),
        (8, {"names": '["a"]'}, "names must be a JSON list of 3 texts"),
        (8, {"names": "a, b, c"}, "names is not a JSON list"),
    ],
)
def test_rows_that_are_refused(
    width: int, metadata: dict[str, str], message: str, fitted: tuple[FitResult, str], write: Write
) -> None:
    other = write({"features": torch.ones(3, width)}, "other", **metadata)
    with pytest.raises(DataError, match=message):
        maple("predict", fitted[0].folder, "--features", other)


@pytest.mark.parametrize(("method", "problem"), [("mmrl", "puts prompts into"), ("two_stage", "changes layers of")])
def test_methods_that_change_a_tower_are_refused(method: str, problem: str, fitted: tuple[FitResult, str]) -> None:
    backbone = load_clip(f"features:{fitted[1]}")
    with pytest.raises(
        UnsupportedTowerError, match=f"{problem} a tower, but it is trained on features, without a CLIP"
    ):
        build_method({"name": method}, backbone, [f"class {n}" for n in range(4)])


def test_images_and_features_exclude_each_other(fitted: tuple[FitResult, str]) -> None:
    result, source = fitted
    with pytest.raises(ConfigError, match=r"leave out a\.png"):
        maple("predict", result.folder, "a.png", "--features", source)
    with pytest.raises(ConfigError, match=r"give \.safetensors files"):
        maple("predict", result.folder, "--features", "a.npy")


def test_a_run_on_images_predicts_features_unless_it_needs_images(backbone: Backbone) -> None:
    rows = FeatureRows(("a", "b"), torch.randn(2, 32, generator=torch.Generator().manual_seed(0)))
    names = ["cat", "dog"]
    coop = TorchPredictor(build_method({"name": "coop", "prompt_length": 2}, backbone, names))
    assert [each.source for each in coop.stream_features(rows, batch_size=1)] == ["a", "b"]
    with pytest.raises(ConfigError, match="it needs images"):
        TorchPredictor(build_method({"name": "vpt", "vision_prompt_depth": 1}, backbone, names)).stream_features(rows)
    with pytest.raises(ConfigError, match="top is 0"):
        coop.stream_features(rows, top=0)


def test_a_named_clip_that_seems_to_be_another_is_only_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    clip = load_clip("maple-tiny", "random:1")
    require_features_of(clip, 128, "our maple tiny", "a.safetensors")
    assert not caplog.records
    require_features_of(clip, 128, "OpenAI CLIP ViT-B/16", "a.safetensors")
    assert "features of 'OpenAI CLIP ViT-B/16', and this run has the CLIP maple-tiny" in caplog.text


def test_what_reads_images_refuses_the_run(fitted: tuple[FitResult, str], tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "black.png")
    with pytest.raises(BackboneError, match="images cannot be read without a CLIP"):
        maple("predict", fitted[0].folder, tmp_path / "black.png")
    with pytest.raises(ConfigError, match="the server reads images"):
        create_app(load_predictor(fitted[0].folder, device="cpu"))


# --- rows that were trained on


def test_rows_that_were_trained_on_are_left_out(
    fitted: tuple[FitResult, str], write: Write, caplog: pytest.LogCaptureFixture
) -> None:
    result, source = fitted
    table, trained = read_features(source), json.loads((result.folder / "items.json").read_text())["items"]
    seen = table.rows([item["path"] for item in trained[:6]])
    fresh = tensors_of(classes=4)["test"] + 0.01
    labels = torch.tensor([item["label"] for item in trained[:6]] + [0, 1, 2, 3])
    # In another order, under other names and in another precision.
    other = {"test": torch.cat([seen, fresh[:4]]).flip(0).half(), "test_labels": labels.flip(0)}
    scores, _ = evaluate_run(result.folder, dataset=write(other, "other"), device="cpu")
    assert scores.images == 4
    assert "6 of 10 images were trained on and left out" in caplog.text
    caplog.clear()
    assert evaluate_run(result.folder, dataset=write(other, "other"), part="all", device="cpu")[0].images == 10
    assert "they are counted" in caplog.text


def test_rows_of_the_own_file_that_have_moved(write: Write, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A path is a number: where the rows of the file have changed, their content counts."""
    tensors = tensors_of()
    folder = tmp_path / "run"
    train_run(settings_of(write(tensors), "taskres", shots=None), folder, device="cpu")
    assert evaluate_run(folder, device="cpu")[0].images == 12
    assert not caplog.records
    write({**tensors, "test": torch.cat([tensors["train"][:3], tensors["test"][3:]])})
    assert evaluate_run(folder, device="cpu")[0].images == 9
    assert "3 images with other content" in caplog.text
    assert "3 of 12 images were trained on and left out" in caplog.text


def test_what_counts_as_the_same_row(write: Write) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(6, 8, generator=generator)
    rows[1] *= 1e6  # too large for half precision
    rows[2] *= 1e-6  # too small for it
    rows[3], rows[4] = rows[2] * (1 + 1e-4), 0.0
    rows[5] = -rows[4]
    table = read_features(write({"features": rows, "labels": torch.tensor([0, 1] * 3)}))
    digests = [table.digest(f"features/{row}") for row in range(6)]
    assert len(set(digests)) == 5
    assert digests[4] == digests[5]
    half = read_features(write({"features": rows[:1].half().repeat(2, 1), "labels": torch.tensor([0, 1])}, "half"))
    assert half.digest("features/1") == digests[0]
    with pytest.raises(DataError, match="no row 'features/6'"):
        table.digest("features/6")


# --- sweeps


def test_a_sweep_over_files_of_features(write: Write, tmp_path: Path) -> None:
    first, second = (write(undivided(12 + 4 * n), f"set{n}", backbone="CLIP A") for n in range(2))
    train, val = tensors_of(), tensors_of(rows=5)
    parts = [write({"train": train["train"], "train_labels": train["train_labels"], "text": train["text"]}, "part0")]
    parts.append(write({"val": val["test"], "val_labels": val["test_labels"]}, "part1"))
    dropped: list[str] = []
    sweep = SweepSettings(
        protocol="few-shot",
        methods=["zero_shot", "taskres", "coop"],
        datasets=[first, second, ",".join(parts)],
        seeds=[1, 2],
        shots=[2],
        settings={"train": {"epochs": 1, "warmup_epochs": 0}},
    )
    runs = plan_sweep(sweep, dropped.append)
    assert len(runs) == 2 * 3 + 2 + 2 + 1, "zero-shot CLIP is one run where the file has a test part"
    assert [text.split()[0] for text in dropped] == ["coop"] * 3
    outcomes = run_sweep(runs, tmp_path / "sweep", device="cpu")
    assert {outcome.status for outcome in outcomes} == {"finished"}
    tables = collect(tmp_path / "sweep", describe_methods())
    groups = {group.key.backbone: group.datasets for group in group_evaluations(tables)}
    assert groups["features of CLIP A"] == ("set0", "set1"), "one table, although each file is a backbone of its own"
    done = maple("sweep", "few-shot", "--methods", "zero_shot", "--datasets", f'{first},"{",".join(parts)}"', "--plan")
    assert "4 runs" in done.stdout
    with pytest.raises(DataError, match=r"gone\.safetensors: there is no such file of features"):
        maple("sweep", "few-shot", "--methods", "zero_shot", "--datasets", "gone.safetensors")


# --- Python


def test_a_classifier_learns_from_features() -> None:
    clip = load_clip("maple-tiny", "random:1")
    generator = np.random.default_rng(0)
    images = generator.integers(0, 150, (24, 64, 64, 3), dtype=np.uint8)
    images[::2, ..., 0] += 100
    labels = ["red", "grey"] * 12
    settings: dict[str, Any] = {"backbone": "maple-tiny", "pretrained": "random:1", "device": "cpu", "epochs": 2}
    settings |= {"settings": {"train": {"views": 0, "warmup_epochs": 0}}}
    on_images = PromptClassifier("taskres", **settings).fit(images, labels)
    features = PromptClassifier("zero_shot", **settings).fit(images, labels).method_.image_features_raw
    transform = eval_transform(clip)
    rows = features(torch.stack([transform(Image.fromarray(image)) for image in images])).numpy()
    on_rows = PromptClassifier("taskres", **settings).fit(rows, labels)
    np.testing.assert_allclose(on_rows.predict_proba(rows), on_images.predict_proba(images), atol=1e-5)
    np.testing.assert_allclose(on_rows.encode_image(torch.from_numpy(rows)), on_rows.encode_image(images), atol=1e-5)
    auto = PromptClassifier("auto", methods=["zero_shot", "taskres", "maple"], **settings).fit(rows, labels)
    assert [each.recipe for each in auto.selection_.candidates if each.skipped] == ["maple"]
    settings["settings"]["method"] = {"prompt_depth": 2}
    with pytest.raises(ConfigError, match="it needs images"):
        PromptClassifier("maple", **settings).fit(rows, labels)
    del settings["settings"]["method"]
    with pytest.raises(DataError, match="has 8 features, and the CLIP of the training 128"):
        PromptClassifier("taskres", **settings).fit(rows[:, :8], labels)
    with pytest.raises(InputError, match="row 3 of the features"):
        to_inputs(np.where(np.arange(24)[:, None] == 3, np.nan, rows))
    with pytest.raises(InputError, match="images has shape"):
        to_inputs(rows.astype(np.int64))
