"""`maple fit --method auto`: the choice of a method by cross-validation on the training images."""

import json
import shutil
import sys
import tomllib
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from maple.cli import app
from maple.clip import Backbone
from maple.config import RunSettings
from maple.data import Dataset, load_dataset, select_dataset
from maple.errors import BackboneError, ConfigError, TrainingDivergedError
from maple.fitting import (
    CANDIDATES,
    Candidate,
    FitProgress,
    Selection,
    SelectionSettings,
    fit,
    fit_candidates,
    fit_folder,
    read_fit,
    workflow,
)
from maple.methods import METHODS, Features, Method
from maple.runs import read_rows, selection, selection_plan
from maple.runs.folder import read_settings
from maple.runs.spec import cached_backbone, sample, spare_items
from maple.runs.training import fresh_method

TINY = {"backbone": {"name": "maple-tiny", "pretrained": "random:1"}, "data": {"shots": 4}}
QUICK = ["train.epochs=2", "train.batch_size=4", "train.warmup_epochs=0"]
RECIPES = ["zero_shot", "tip_adapter", "clip_adapter"]
TITLES = ["zero-shot CLIP", "Tip-Adapter", "CLIP-Adapter"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four classes that their colour tells apart; eight images each."""
    root = tmp_path_factory.mktemp("images") / "colours"
    generator = np.random.default_rng(0)
    colours = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 50, 220), "grey": (120, 120, 120)}
    for name, colour in colours.items():
        (root / name).mkdir(parents=True)
        for number in range(8):
            pixels = np.clip(np.array(colour) + generator.normal(0, 25, (6, 6, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).resize((40, 40), Image.Resampling.BICUBIC).save(root / name / f"{number}.png")
    return root


def candidates(images: Path, recipes: list[str] = RECIPES, **layer: Any) -> dict[str, RunSettings]:
    return fit_candidates(str(images), recipes, layer={**TINY, **layer}, overrides=QUICK)


def tiny() -> Backbone:
    return cached_backbone("maple-tiny", "random:1", "fp32", torch.device("cpu"))


def contents(folder: Path) -> dict[str, Any]:
    scores = {
        entry["recipe"]: entry["scores"] for entry in json.loads((folder / "selection.json").read_text())["candidates"]
    }
    rows = [json.dumps(row, sort_keys=True) for row in read_rows(folder)]
    return {"prompts": (folder / "prompts.safetensors").read_bytes(), "rows": rows, "scores": scores}


@pytest.fixture(scope="module")
def fitted(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "auto"
    fit(candidates(images), folder, device="cpu")
    return folder


def test_the_best_by_cross_validation_is_trained(fitted: Path) -> None:
    found = read_fit(fitted).selection
    assert found is not None
    assert {candidate.recipe for candidate in found.tried} == set(RECIPES)
    scores = [candidate.score for candidate in found.tried]
    assert scores == sorted(scores, reverse=True)
    assert {len(candidate.right) for candidate in found.tried} == {24}, "every training image is scored once"
    settings = read_settings(fitted)
    assert settings.method["name"] == found.chosen.recipe
    assert found.reason.startswith(f"{found.chosen.title[:1].upper()}{found.chosen.title[1:]} was chosen: ")
    assert f"{100 * found.chosen.score:.1f} % of 24 training images" in found.reason
    assert not (fitted / ".selection").exists()
    result = read_fit(fitted)
    assert result.selection == found
    assert result.accuracy is not None
    page = (fitted / "report.html").read_text()
    assert "How the method was chosen" in page
    assert "Accuracy on held-out images" in page


def test_a_repeated_fit_shows_its_result(fitted: Path, images: Path) -> None:
    before = contents(fitted)
    result = fit(candidates(images), fitted, device="cpu")
    assert result.was_finished
    assert contents(fitted) == before
    with pytest.raises(ConfigError, match=r"other settings \(selection\.minutes: 10\.0 there, 20\.0 now\)|selection"):
        fit(candidates(images), fitted, selection=SelectionSettings(minutes=20), device="cpu")


@pytest.mark.parametrize("trial", [1, 10])
def test_an_interrupted_choice_is_resumed(trial: int, fitted: Path, images: Path, tmp_path: Path) -> None:
    class Interrupting(FitProgress):
        def trying(self, title: str, done: int, total: int) -> None:
            assert (title in TITLES, total) == (True, 12)
            if done == trial:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(candidates(images), tmp_path / "run", device="cpu", progress=Interrupting())
    assert not (tmp_path / "run" / "prompts.safetensors").exists()
    fit(candidates(images), tmp_path / "run", device="cpu")
    assert contents(tmp_path / "run") == contents(fitted)


def dataset_without_test_images(images: Path) -> Dataset:
    dataset = load_dataset(str(images), None)
    return replace(dataset, test=tuple(replace(item, path=f"gone/{item.path}") for item in dataset.test))


def test_no_test_image_is_used(images: Path) -> None:
    tried = candidates(images)

    def train(_name: str, settings: RunSettings, part: Dataset) -> Method:
        seen.update(item.path for item in (*part.train, *part.val))
        assert not part.test
        return fresh_method(settings, backbone, part.class_names)

    backbone = tiny()
    dataset = dataset_without_test_images(images)
    assert dataset.test
    assert not any(dataset.file(item).exists() for item in dataset.test)
    seen = set[str]()
    chosen = [selection.select(tried, used, backbone, train) for used in (dataset, replace(dataset, test=()))]
    assert chosen[0][0] == chosen[1][0]
    assert [each.right for each in chosen[0][1].tried] == [each.right for each in chosen[1][1].tried]
    assert seen == {item.path for item in dataset.train}


def test_folds_divide_each_class(images: Path) -> None:
    dataset = load_dataset(str(images), None)
    settings = candidates(images)["clip_adapter"]
    folds = [selection_plan.make_fold(dataset, settings, "trained", number) for number in range(selection_plan.FOLDS)]
    scored = Counter(item.path for fold in folds for item in fold.trained)
    assert scored == Counter(item.path for item in dataset.train)
    for fold in folds:
        assert not {item.path for item in fold.trained} & {item.path for item in fold.train.train}
        assert {item.label for item in fold.train.train} == set(range(4))
        assert not fold.train.test
    only = [item for item in dataset.train if item.label] + [next(item for item in dataset.train if not item.label)]
    alone = replace(dataset, train=tuple(only))
    for number in range(selection_plan.FOLDS):
        fold = selection_plan.make_fold(alone, settings, "trained", number)
        assert 0 in {item.label for item in fold.train.train}, "the only image of a class is always trained on"


def test_near_copies_are_divided_together(images: Path) -> None:
    """No image is predicted, chosen on or calibrated on where a near copy of it was trained on."""
    dataset = load_dataset(str(images), None)
    by_label = [[item.path for item in dataset.train if item.label == label] for label in range(4)]
    groups = (*(tuple(paths[:2]) for paths in by_label), *(tuple(paths[2:5]) for paths in by_label))
    dataset = replace(dataset, near_copies=groups)
    tried = candidates(images, data={"shots": 2})
    for number in range(selection_plan.FOLDS):
        fold = selection_plan.make_fold(dataset, tried["tip_adapter"], "trained", number)
        parts = [{item.path for item in part} for part in (fold.train.train, fold.train.val, fold.trained)]
        assert all(parts[:2])
        assert not any(sum(not part.isdisjoint(group) for part in parts) > 1 for group in groups)
    trained, val, _ = sample(tried["clip_adapter"], dataset)
    spare = {item.path for item in spare_items(tried["clip_adapter"], dataset, trained, val)}
    learned = {item.path for item in trained}
    assert spare == {item.path for item in dataset.train} - learned - {
        path for group in groups if learned & set(group) for path in group
    }


def test_a_method_that_selects_a_setting_gets_validation_images_apart(images: Path) -> None:
    dataset = load_dataset(str(images), None)
    fold = selection_plan.make_fold(dataset, candidates(images)["tip_adapter"], "trained", 0)
    parts = [fold.train.train, fold.train.val, fold.trained, dataset.test]
    paths = [{item.path for item in part} for part in parts]
    assert all(paths)
    assert sum(map(len, paths)) == len(set.union(*paths))


def test_new_names(images: Path, tmp_path: Path) -> None:
    options = SelectionSettings(goal="new")
    result = fit(candidates(images, ["zero_shot", "tip_adapter", "coop"]), tmp_path, selection=options, device="cpu")
    found = result.selection
    assert found is not None
    assert {candidate.recipe for candidate in found.tried} == {"zero_shot", "coop"}
    (skipped,) = (candidate for candidate in found.candidates if candidate.skipped)
    assert (skipped.recipe, skipped.skipped) == ("tip_adapter", "cannot predict class names that were not trained")
    for candidate in found.tried:
        assert len(candidate.right) == len(candidate.new) == 12
        trained, new = candidate.accuracy, candidate.new_accuracy
        assert candidate.score == pytest.approx(2 * trained * new / (trained + new) if trained + new else 0)
    fold = selection_plan.make_fold(load_dataset(str(images), None), candidates(images)["clip_adapter"], "new", 1)
    assert (fold.train.class_names, fold.new_names) == (("green", "grey", "red")[1:], ("blue", "green"))
    few = select_dataset(load_dataset(str(images), None), "base")
    assert result.page is not None
    assert result.page.read_text().count('<th scope="col">95 % interval</th>') == 2
    with pytest.raises(ConfigError, match="needs at least 4"):
        selection_plan.make_plan(
            candidates(images), few, cached_backbone("maple-tiny", "random:1", "fp32", "cpu"), options
        )  # type: ignore[arg-type]


def plan(images: Path, seconds: dict[str, tuple[float, int]], minutes: float, monkeypatch: Any) -> dict[str, Any]:
    class Clock:
        def __init__(self, *_: object) -> None:
            pass

        def extraction(self, *_: object) -> float:
            return 0.0

        def costs(self, settings: RunSettings, _fold: object) -> dict[str, float]:
            taken, steps = seconds[settings.method["name"]]
            return {"seconds": taken, "steps": steps, "epoch": 4}

    monkeypatch.setattr(selection_plan, "_Clock", Clock)
    backbone = tiny()
    options = SelectionSettings(minutes=minutes)
    state = selection_plan.make_plan(
        candidates(images, list(seconds)), load_dataset(str(images), None), backbone, options
    )
    return {"folds": state["folds"], **{entry["recipe"]: entry for entry in state["candidates"]}}


def test_fewer_parts_then_fewer_steps_then_fewer_methods(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    costs = {"zero_shot": (1.0, 0), "coop": (20.0, 100), "maple": (50.0, 200)}
    assert plan(images, costs, 10, monkeypatch)["folds"] == 4
    assert plan(images, costs, 5, monkeypatch)["folds"] == 2
    assert plan(images, costs, 2.5, monkeypatch)["folds"] == 1
    short = plan(images, costs, 1.9, monkeypatch)
    assert (short["folds"], short["coop"]["changes"], short["maple"]["skipped"]) == (1, {}, "")
    steps = short["maple"]["changes"]["steps"]
    assert 66 < steps < 200
    assert short["maple"]["remark"] == f"trained for {steps} of 200 steps, for want of time"
    # As many as are then trained: whole epochs, and one more than the warm-up takes.
    trained = candidates(images)["clip_adapter"].train.changed(steps=steps).with_epochs_for(4)
    assert 4 * trained.epochs == steps
    assert short["maple"]["seconds"] == pytest.approx(50 * steps / 200)
    for warmup, skipped in ((45, False), (46, True)):
        monkeypatch.setattr(sys.modules[__name__], "QUICK", [*QUICK[:2], f"train.warmup_epochs={warmup}"])
        longer = plan(images, costs, 1.9, monkeypatch)
        assert bool(longer["maple"]["skipped"]) == skipped, "184 steps are 46 epochs"
    monkeypatch.undo()
    shorter = plan(images, costs, 0.9, monkeypatch)
    assert shorter["maple"]["skipped"] == "not enough time: it needs about 3 minutes in all"
    assert plan(images, costs, 0.001, monkeypatch)["zero_shot"]["skipped"] == "", "the fastest one is always tried"


def test_methods_that_are_fitted_take_their_time(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The estimate of a fit is that on features of the part's images, as many as there are, in each view."""
    settings = candidates(images, ["zero_shot", "linear_probe", "gda", "tip_adapter"])
    dataset, seen = load_dataset(str(images), None), {}

    def fit_seconds(self: Method, features: Features) -> float:
        seen[self.title] = features
        return 1000.0

    for kind in (METHODS[each.method["name"]] for each in settings.values()):
        monkeypatch.setattr(kind, "fit_seconds", fit_seconds)
    clock = selection_plan._Clock(dataset, tiny())
    seconds = {}
    for recipe, each in settings.items():
        fold = selection_plan.make_fold(dataset, each, "trained", 0)
        seconds[recipe] = clock.costs(each, fold)["seconds"]
        if features := seen.get(METHODS[each.method["name"]].title):
            train, val, names = sample(each, fold.train)
            views = max(each.train.views or 0, 1)
            assert features.train.shape == (views, len(train), tiny().embed_dim)
            assert len(features.val) == len(val)
            assert set(features.train_labels.tolist()) == set(range(len(names)))
    assert set(seen) == {"linear probe", "GDA", "Tip-Adapter"}
    assert seconds["zero_shot"] < 1000 <= min(seconds[recipe] for recipe in settings if recipe != "zero_shot")
    monkeypatch.setattr(selection_plan, "_MOST_TIMED", 1)
    fold = selection_plan.make_fold(dataset, settings["gda"], "trained", 0)
    images_of_part = len(sample(settings["gda"], fold.train)[0])
    cost = clock.costs(settings["gda"], fold)["seconds"]
    assert cost >= 1000 * images_of_part / 4, "of one image of each of four classes"


@pytest.mark.parametrize("place", ["a folder", "off", "a file"])
def test_features_are_counted_once_where_they_are_kept(
    place: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MAPLE_CACHE", {"a folder": str(tmp_path / "new"), "off": "off"}.get(place, f"{tmp_path}/file"))
    settings = candidates(images, ["tip_adapter", "gda", "taskres", "clip_adapter-own"], train={"views": 0})
    dataset = load_dataset(str(images), None)
    clock = selection_plan._Clock(dataset, tiny())
    clock._image_seconds = 1000.0
    counted = {}
    for recipe, each in settings.items():
        fold = selection_plan.make_fold(dataset, each, "trained", 0)
        counted[recipe] = clock.costs(each, fold)["seconds"] // 1000
    # Two lists are trained on: with and without images that are held out for validation.
    first, other = 14 + 4 + 6, 16 + 6  # trained on, chosen on, scored
    if place == "a folder":
        assert counted == {"tip_adapter": first, "gda": 0, "taskres": 16, "clip_adapter-own": 0}
    else:
        assert counted == {"tip_adapter": first, "gda": first, "taskres": other, "clip_adapter-own": other}


def test_zero_shot_that_wins_is_kept(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "_right", lambda method, *_: "1" if type(method).__name__ == "ZeroShot" else "0")
    settings = candidates(images, ["zero_shot", "coop"])
    result = fit(settings, tmp_path / "run", device="cpu")
    assert result.selection is not None
    assert result.selection.chosen.recipe == "zero_shot"
    assert "None of the other methods did better, so nothing was learned." in result.selection.reason
    assert read_settings(tmp_path / "run").method["name"] == "zero_shot"
    assert not (tmp_path / "run" / "zero_shot").exists()
    assert (result.comparison, result.accuracy is not None) == (None, True)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Nothing was trained." in page
    assert "training images, 3 of each class" not in page
    assert fit(settings, tmp_path / "run", device="cpu").was_finished


def test_a_candidate_that_diverges_is_left_out(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = workflow.train_run

    def diverging(settings: RunSettings, *arguments: Any, **options: Any) -> Any:
        if settings.method["name"] == "coop":
            raise TrainingDivergedError("training diverged: the loss is nan")
        return train(settings, *arguments, **options)

    monkeypatch.setattr(workflow, "train_run", diverging)
    result = fit(candidates(images, ["zero_shot", "coop"]), tmp_path / "run", device="cpu")
    assert result.selection is not None
    assert [candidate.recipe for candidate in result.selection.tried] == ["zero_shot"]
    assert result.selection.candidates[1].skipped == "training diverged: the loss is nan"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "does not fit into the device's memory"),
        (MemoryError("unable to allocate"), "does not fit into the device's memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "does not fit into the device's memory"),
        (BackboneError("3 of 24 images have logits that are not finite"), "3 of 24 images have logits that"),
    ],
)
def test_a_candidate_that_cannot_be_computed_is_left_out(
    error: Exception, reason: str, images: Path, tmp_path: Path
) -> None:
    def train(name: str, settings: RunSettings, part: Dataset) -> Method:
        tried.append(name)
        if settings.method["name"] == failing:
            raise error
        return fresh_method(settings, tiny(), part.class_names)

    dataset, tried, failing = load_dataset(str(images), None), list[str](), "clip_adapter"
    both = candidates(images, ["zero_shot", "clip_adapter"])
    for _ in range(2):
        settings, found = selection.select(both, dataset, tiny(), train, path=tmp_path / "plan.json")
        assert settings.method["name"] == "zero_shot"
        assert found.candidates[1].skipped.startswith(reason)
    assert tried.count("clip_adapter_0") == 1, "it is not tried again"
    with pytest.raises(ConfigError, match=f"none of the methods can be tried: clip_adapter: {reason}"):
        selection.select(candidates(images, ["clip_adapter"]), dataset, tiny(), train)
    failing = "zero_shot"
    with pytest.raises(type(error)):
        selection.select(both, dataset, tiny(), train)


def test_other_errors_of_a_candidate_end_the_choice(images: Path) -> None:
    def train(*_: object) -> Method:
        raise RuntimeError("shapes cannot be multiplied")

    dataset = load_dataset(str(images), None)
    with pytest.raises(RuntimeError, match="shapes"):
        selection.select(candidates(images, ["clip_adapter"]), dataset, tiny(), train)


def test_a_plan_without_what_does_not_fit_into_the_memory(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(selection_plan.Trainer, "step", full)
    dataset, options = load_dataset(str(images), None), SelectionSettings()
    made = selection_plan.make_plan(candidates(images, ["zero_shot", "coop"]), dataset, tiny(), options)
    assert [entry["skipped"] for entry in made["candidates"]] == ["", "does not fit into the device's memory"]
    monkeypatch.setattr(selection_plan, "encode_image", full)
    with pytest.raises(torch.OutOfMemoryError):
        selection_plan.make_plan(candidates(images, ["zero_shot"]), dataset, tiny(), options)


def test_few_images_are_scored_in_the_first_part(images: Path, tmp_path: Path) -> None:
    for name, count in (("grey", 1), ("red", 3)):
        (tmp_path / "few" / name).mkdir(parents=True)
        for number in range(count):
            shutil.copy(images / name / f"{number}.png", tmp_path / "few" / name)
    settings = candidates(tmp_path / "few", ["zero_shot", "clip_adapter"])
    options = SelectionSettings(minutes=0.01)
    for was_finished in (False, True):
        result = fit(settings, tmp_path / "run", selection=options, device="cpu")
        assert result.was_finished == was_finished
        assert result.selection is not None
        scored = min(result.selection.folds, 2)
        assert {len(candidate.right) for candidate in result.selection.tried} == {scored}
    none = Candidate("coop", "CoOp", (), (), 1.0)
    assert none.interval == (0, 1), "of a fit of an earlier version"
    assert np.isnan(none.score)
    assert "nan" in str(Selection("trained", 10, 1, (none,)))


def test_new_names_need_scored_images_of_both_halves(images: Path) -> None:
    dataset = load_dataset(str(images), None)
    most = {0: 1, 1: 2, 2: 1, 3: 2}  # so that the parts 0 and 1 hold new names alone
    few = [item for label, count in most.items() for item in [i for i in dataset.train if i.label == label][:count]]
    with pytest.raises(ConfigError, match="too few classes have more than one image to score both"):
        selection_plan.make_plan(
            candidates(images, ["zero_shot"]), replace(dataset, train=tuple(few)), tiny(), SelectionSettings(goal="new")
        )


def test_trials_stay_in_the_folder_of_the_fit() -> None:
    """Recipes may be paths of files, also of two files of one name."""
    recipes = ["tip-adapter-f", "/home/ada/own.toml", "../own.toml", "own.toml", "plug.py:Own"]
    names = [selection.trial_name(recipe, 3) for recipe in recipes]
    assert names[0] == "tip-adapter-f_3"
    assert len(set(names)) == len(names)
    assert all(name == Path(name).name and not name.startswith(".") for name in names)


def test_variants_of_one_method_have_titles_of_their_own(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    costs = {"zero_shot": (1.0, 0), "tip_adapter": (1.0, 0), "tip-adapter-f": (1.0, 10)}
    made = plan(images, costs, 10, monkeypatch)
    assert [made[recipe]["title"] for recipe in costs] == [
        "zero-shot CLIP",
        "Tip-Adapter (tip_adapter)",
        "Tip-Adapter (tip-adapter-f)",
    ]


def test_equal_scores_take_the_simpler_one() -> None:
    both = [Candidate(name, name, (True, False), (), 1.0) for name in ("zero_shot", "coop")]
    entries = [{**vars(each), "scores": [["10"]]} for each in both]
    state = {"goal": "trained", "minutes": 10, "folds": 1, "candidates": entries}
    assert selection._selection(state, Path("x")).chosen.recipe == "zero_shot"
    reason = Selection("trained", 10, 4, tuple(reversed(both))).reason
    assert reason.endswith("Next comes zero_shot with 50.0 % (sign test: p = 1.000, may be chance).")


def test_the_reason_for_new_names() -> None:
    """The harmonic mean may be higher where fewer images are predicted correctly in all."""
    even = Candidate("even", "Even", (True,) * 60 + (False,) * 40, (True,) * 60 + (False,) * 40, 1.0)
    odd = Candidate("odd", "Odd", (True,) * 100, (True,) * 40 + (False,) * 60, 1.0)
    assert even.score > odd.score
    chosen = Selection("new", 10, 4, (even, odd))
    assert "over 100 training images of trained names and 100 of new names, none of which" in chosen.reason
    assert chosen.reason.endswith("(sign test: p = 0.013, may be chance).")
    assert "on 100 training images of trained names and 100 of new names, each" in chosen.conditions
    assert "new names  60.0  (50.2 to 69.1)" in str(chosen)
    entry = chosen.as_json()["candidates"][0]
    assert (entry["images"], entry["new_images"], entry["new_interval"]) == (100, 100, even.new_interval)


def test_candidates_and_folders(images: Path) -> None:
    assert CANDIDATES[0] == "zero_shot"
    settings = candidates(images)
    assert fit_folder(settings).name.startswith("fit_colours_auto_all_4shots_seed1_")
    others = [fit_folder(settings, SelectionSettings(goal="new")), fit_folder(candidates(images, ["coop"]))]
    others += [fit_folder(settings, keep_near_copies=True), fit_folder(settings["clip_adapter"])]
    others += [fit_folder(settings["clip_adapter"], keep_near_copies=True)]
    assert len({fit_folder(settings), *others}) == 6
    assert others[-1].name == f"{others[-2].name}_near-copies"
    with pytest.raises(ConfigError, match="settings of a method need one method"):
        fit_candidates(str(images), overrides=["method.prompt_length=2"])
    with pytest.raises(ConfigError, match="name each once"):
        fit_candidates(str(images), ["coop", "coop"])


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


OPTIONS = ["--backbone", "maple-tiny", "--pretrained", "random:1", "--shots", "4", "--device", "cpu"]
OPTIONS += [word for setting in QUICK for word in ("--set", setting)]


def test_the_command(images: Path, tmp_path: Path) -> None:
    done = run("fit", images, *OPTIONS, "--methods", "zero_shot,taskres", "--output", tmp_path / "run")
    assert done.exit_code == 0, done.output
    assert "methods tried. In per cent, on 24 training images" in done.output
    assert "was chosen: " in done.output
    answer = json.loads(
        run("fit", images, *OPTIONS, "--methods", "zero_shot,taskres", "--output", tmp_path / "run", "--json").stdout
    )
    assert {entry["recipe"] for entry in answer["selection"]["candidates"]} == {"zero_shot", "taskres"}
    assert answer["selection"]["chosen"] in ("zero_shot", "taskres")
    text = run("fit", images, *OPTIONS, "--print-config").stdout
    assert text.startswith("# The settings of 11 methods, of which fit tries each. For --preset: --method NAME.\n")
    assert list(tomllib.loads(text)) == list(CANDIDATES)
    (tmp_path / "all.toml").write_text(text)
    with pytest.raises(ConfigError, match=r"all\.toml holds the settings of 11 methods, .* give those of one"):
        run("fit", images, *OPTIONS, "--preset", tmp_path / "all.toml")
    one = tomllib.loads(
        run("fit", images, *OPTIONS, "--preset", "coop_few-shot", "--epochs", 3, "--print-config").stdout
    )
    assert (one["method"]["name"], one["train"]["epochs"]) == ("coop", 2), "--set counts more than --epochs"
    longer = ["--preset", "coop_few-shot", "--set", "method.prompt_length=8", "--print-config"]
    assert tomllib.loads(run("fit", images, *OPTIONS, *longer).stdout)["method"]["prompt_length"] == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "coop", "--goal", "new"], "--goal: only for --method auto"),
        (["--method", "coop", "--preset", "coop_few-shot"], "leave out --method coop"),
        (["--methods", "coop,maple", "--set", "method.prompt_depth=3"], "settings of a method need one method"),
        (["--goal", "best"], "goal"),
        (["--minutes", "0"], "minutes"),
        (["--methods", "zero_shot,coup"], "coop"),
        (["--tracker", "notebook"], "tensorboard"),
    ],
)
def test_options_that_cannot_be_used(arguments: list[str], message: str, images: Path, tmp_path: Path) -> None:
    outcome = CliRunner().invoke(app, ["fit", str(images), *arguments, "--output", str(tmp_path / "run")])
    assert isinstance(outcome.exception, ConfigError)
    assert message in str(outcome.exception)
    assert not (tmp_path / "run").exists()


def test_settings_of_a_method_mean_one_method(images: Path) -> None:
    options = [*OPTIONS, "--set", "method.prompt_depth=1", "--print-config"]
    outcome = run("fit", images, *options)
    assert "fitting maple alone" in outcome.stderr
    assert tomllib.loads(outcome.stdout)["method"]["prompt_depth"] == 1
