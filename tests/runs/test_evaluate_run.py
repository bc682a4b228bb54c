"""Evaluation of a finished run: parts of the classes, other images, other names, and the rows it leaves."""

import errno
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from maple import build_method, load_clip
from maple.checkpoint import load_prompts
from maple.config import RunSettings
from maple.data import batches, load_dataset
from maple.data.images.prefetch import map_in_order
from maple.errors import CheckpointError, ClassNamesError, ConfigError, DataError
from maple.methods import Method
from maple.metrics import Scores
from maple.runs import content_name, evaluate_run, finished_prompts, read_settings, train_run
from maple.runs.folder import evaluation_key
from maple.runs.frozen_features import prediction_batches

Evaluate = Callable[..., tuple[Scores, dict[str, Any]]]


@pytest.fixture
def run(make_images: Callable[..., Path], settings_for: Callable[..., RunSettings], tmp_path: Path) -> Path:
    settings = settings_for(make_images(), epochs=1)
    data = settings.data.changed(classes="base", class_names={"bird": "small bird"})
    return train_run(settings.changed(data=data), tmp_path / "run").folder


@pytest.fixture
def evaluate(run: Path) -> Evaluate:
    method: Method = load_prompts(finished_prompts(run))
    return lambda **options: evaluate_run(run, method=method, **options)


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "rows.jsonl").read_text().splitlines()]


def test_parts_of_the_classes(evaluate: Evaluate, run: Path) -> None:
    for classes, names in (
        ("base", ["small bird", "cat"]),
        ("novel", ["dog", "eel"]),
        ("all", ["small bird", "cat", "dog", "eel"]),
    ):
        scores, row = evaluate(classes=classes)
        assert scores.images == 3 * len(names)
        assert row["class_names"] == names
        assert row["top1"] == scores.top1
        assert (row["classes"], row["part"], row["dataset"]) == (classes, "test", "pictures")
        assert (row["seed"], row["method"]["name"], row["source"]["classes"]) == (1, "maple", "base")
    assert [row["classes"] for row in rows(run)] == ["base", "novel", "all"]
    assert evaluate(part="train")[0].images == 16


@pytest.mark.parametrize(("cores", "overlap"), [(2, False), (8, True)])
@pytest.mark.parametrize("method", [{"name": "maple", "prompt_depth": 1}, {"name": "zero_shot"}])
def test_images_are_read_ahead_where_cores_are_left(
    method: dict[str, Any],
    cores: int,
    overlap: bool,
    make_images: Callable[..., Path],
    settings_for: Callable[..., RunSettings],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where only the frozen features of the images are needed."""
    folder = make_images()
    settings = settings_for(folder)
    settings = settings.changed(evaluate=settings.evaluate.changed(workers=2))
    built = build_method(method, load_clip("maple-tiny", "random"), ["bird", "cat", "dog", "eel"])
    dataset, asked = load_dataset(str(folder), None), []
    monkeypatch.setattr("maple.data.images.prefetch.usable_cores", lambda: cores)
    monkeypatch.setattr(
        batches, "map_in_order", lambda *given, overlap: (asked.append(overlap), map_in_order(*given))[1]
    )
    assert sum(map(len, prediction_batches(built, dataset.test, dataset.store(), settings))) == 12
    assert asked == [overlap]


def test_rows_are_idempotent(evaluate: Evaluate, run: Path) -> None:
    first = evaluate(classes="base")[1]
    evaluate(classes="novel")
    assert evaluate(classes="base")[1] == first
    assert [row["classes"] for row in rows(run)] == ["novel", "base"]
    evaluate(classes="base", names=["one", "two"])
    assert len(rows(run)) == 3


def test_an_evaluation_after_images_were_added_replaces_the_one_before(
    evaluate: Evaluate, make_images: Callable[..., Path], run: Path
) -> None:
    other = make_images("others", classes=("cat", "owl"))
    evaluate(dataset=str(other))
    Image.new("RGB", (32, 32), "red").save(other / "test" / "owl" / "new.png")
    _, row = evaluate(dataset=str(other))
    assert row["images"] == 7
    assert [each["images"] for each in rows(run)] == [7]


def test_two_versions_of_a_data_set_are_two_evaluations() -> None:
    """As ImageNetV2, which has three, under one name."""
    rows = [{"dataset": "imagenetv2", "place": "", "asked": {"root": root}} for root in (None, "/a", "/b")]
    assert len({json.dumps(evaluation_key(each)) for each in rows}) == 3


def test_the_method_is_loaded_when_none_is_given(evaluate: Evaluate, run: Path) -> None:
    seen: list[tuple[int, int]] = []
    assert evaluate_run(run, on_images=lambda done, total: seen.append((done, total)))[1] == evaluate()[1]
    assert seen == [(12, 12)]


def test_other_images_with_other_names(evaluate: Evaluate, make_images: Callable[..., Path], run: Path) -> None:
    folder = make_images("vehicles", ("bus", "car"), test=5)
    scores, row = evaluate(dataset=str(folder))
    assert scores.images == 10
    assert (row["dataset"], row["class_names"]) == ("vehicles", ["bus", "car"])
    again = evaluate(dataset=str(folder), class_names={"bus": "school bus"})[1]
    assert again["class_names"] == ["school bus", "car"]
    assert len(rows(run)) == 2


def test_two_folders_of_one_name_do_not_replace_each_other(
    evaluate: Evaluate, make_images: Callable[..., Path], run: Path
) -> None:
    one, other = make_images("a/held_out", ("bus", "car")), make_images("b/held_out", ("bus", "car"), test=4)
    assert evaluate(dataset=str(one))[1]["images"] == 6
    assert evaluate(dataset=str(other))[1]["images"] == 8
    assert [row["images"] for row in rows(run)] == [6, 8]
    alike = make_images("c/held_out", ("bus", "car"))
    assert evaluate(dataset=str(alike))[1]["is_own"] is False
    assert evaluate()[1]["is_own"] is True
    evaluate(dataset=f"{alike}/../held_out")
    kept = rows(run)
    assert [row["images"] for row in kept] == [6, 8, 12, 6], "the files of the last have the names of the first's"
    assert kept[0]["items"] == kept[-1]["items"]
    assert len({row["predictions"] for row in kept}) == 4


def test_one_domain_to_another_and_a_manifest(
    make_images: Callable[..., Path], settings_for: Callable[..., RunSettings], tmp_path: Path
) -> None:
    for domain, classes in (("photo", ("cat", "dog")), ("sketch", ("cat",))):
        make_images(f"animals/{domain}", classes)
    animals = tmp_path / "animals"
    settings = settings_for(Path(f"{animals}:photo"), epochs=0)
    assert content_name(settings).startswith("animals-photo_maple_")
    run = train_run(settings, tmp_path / "run").folder
    assert evaluate_run(run)[1]["dataset"] == "animals/photo"
    scores, row = evaluate_run(run, dataset=f"{animals}:sketch")
    assert (row["dataset"], row["class_names"], row["part"], scores.images) == (
        "animals/sketch",
        ["cat", "dog"],
        "test",
        3,
    )
    (animals / "some.csv").write_text("path,label\nphoto/test/cat/0.png,cat\nphoto/test/dog/0.png,dog\n")
    row = evaluate_run(run, dataset=str(animals / "some.csv"))[1]
    assert (row["dataset"], row["part"], row["images"]) == ("some", "all", 2)


def test_a_published_target_is_read_with_its_own_sentences(
    settings_for: Callable[..., RunSettings], tmp_path: Path
) -> None:
    for folder, file, classes in (
        ("eurosat/2750", "split_zhou_EuroSAT.json", ("Forest", "River")),
        ("dtd/images", "split_zhou_DescribableTextures.json", ("banded", "dotted")),
    ):
        rows: list[list[object]] = []
        for label, name in enumerate(classes):
            rows.append([f"{name}/1.png", label, name])
            path = tmp_path / folder / name / "1.png"
            path.parent.mkdir(parents=True)
            Image.new("RGB", (8, 8), (40 * label, 80, 120)).save(path)
        split = json.dumps({"train": rows, "val": [], "test": rows})
        (tmp_path / folder.partition("/")[0] / file).write_text(split)
    settings = settings_for(Path("eurosat"), {"name": "zero_shot"}, epochs=0)
    data = settings.data.changed(dataset="eurosat", root=str(tmp_path))
    folder = train_run(settings.changed(data=data), tmp_path / "run").folder
    method = load_prompts(finished_prompts(folder))
    _, own = evaluate_run(folder, method=method)
    scores, row = evaluate_run(folder, dataset="dtd", root=str(tmp_path), method=method)
    assert "sentences" not in own
    assert row["sentences"] == {"templates": ["{} texture."]}
    assert row["method"]["templates"] == ["a centered satellite photo of {}."], "the settings of the run"
    alone = train_run(settings.changed(data=data.changed(dataset="dtd")), tmp_path / "alone").folder
    expected, _ = evaluate_run(alone)
    assert scores.calibration_error == pytest.approx(expected.calibration_error)


def test_a_published_list_is_predicted_by_the_published_rule(
    settings_for: Callable[..., RunSettings], tmp_path: Path, make_images: Callable[..., Path]
) -> None:
    method = {"name": "mmrl", "layers": [2, 3], "token_width": 8}
    settings = settings_for(Path("emoji-activities"), method, epochs=0)
    data = settings.data.changed(dataset="emoji-activities", classes="base", shots=1)
    folder = train_run(settings.changed(data=data), tmp_path / "run").folder
    loaded: Any = load_prompts(finished_prompts(folder))
    count = len(loaded.class_names)
    evaluate_run(folder, method=loaded, only=["balloon"])
    assert len(loaded.trained) == 1
    _, row = evaluate_run(folder, dataset="emoji-activities/lineart", method=loaded, only=["balloon"])
    assert (row["class_names"], row["target_rule"]) == (["balloon"], "none")
    assert len(loaded.trained) == 0, "another published data set, which the authors treat as new"
    images = make_images(classes=("balloon", "cat"))
    _, row = evaluate_run(folder, dataset=str(images), method=loaded)
    assert len(row["class_names"]) >= 2
    assert len(loaded.trained) == 1 < count, "a user's own images: as in predictions, name by name"


@pytest.mark.parametrize("form", ["{}", "class_{}", "{}.0"])
def test_names_of_numbered_classes_follow_the_numbers(
    form: str, make_images: Callable[..., Path], run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    classes = [form.format(number) for number in (1, 2, 10)]
    names = ["one", "two", "ten"]
    _, row = evaluate_run(run, dataset=str(make_images("numbers", classes=classes)), names=names)
    assert row["class_names"] == ["one", "ten", "two"], "sorted as text"
    assert f"{classes[0]} = one, {classes[1]} = two, {classes[2]} = ten" in caplog.text
    caplog.clear()
    _, row = evaluate_run(run, dataset=str(make_images("words", classes=["b2", "a10", "c1"])), names=names)
    assert row["class_names"] == names
    assert "by number" not in caplog.text


def test_names_and_only(evaluate: Evaluate) -> None:
    whole = evaluate()[0]
    scores, row = evaluate(only=["dog", "small bird"])
    assert row["class_names"] == ["small bird", "dog"], "in label order"
    assert scores.images == 6
    assert len(scores.confusion) == 2
    named, row = evaluate(names=["w", "x", "y", "z"])
    assert row["class_names"] == ["w", "x", "y", "z"]
    assert named.images == whole.images
    assert evaluate(only=["dog", "eel"], names=["x", "y"])[1]["class_names"] == ["x", "y"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"part": "tset"}, ConfigError, r"unknown part 'tset'; choose one of: test, val, train"),
        ({"classes": "old"}, ConfigError, r"unknown choice of classes 'old'; choose one of: all, base, novel"),
        ({"names": ["one"]}, ClassNamesError, r"1 names were given for 4 classes: small bird, cat, dog, eel"),
        ({"names": []}, ClassNamesError, r"0 names were given for 4 classes"),
        ({"only": ["cow"]}, ClassNamesError, r"no class is called 'cow'; there are: small bird, cat, dog, eel"),
        ({"only": []}, ClassNamesError, r"the list of classes to keep is empty; choose some of: small bird, cat"),
        ({"part": "val"}, DataError, r"the val part of pictures has no images"),
        ({"dataset": "nowhere"}, DataError, r"unknown data set 'nowhere'"),
    ],
)
def test_refused(options: dict[str, Any], error: type[Exception], message: str, evaluate: Evaluate, run: Path) -> None:
    with pytest.raises(error, match=message):
        evaluate(**options)
    assert not (run / "rows.jsonl").exists()


def test_damaged_rows_are_told(evaluate: Evaluate, run: Path) -> None:
    (run / "rows.jsonl").write_text('{"dataset":')
    with pytest.raises(CheckpointError, match=r"rows.jsonl is damaged: line 1 is not JSON: .*; move it away"):
        evaluate()
    assert (run / "rows.jsonl").read_text() == '{"dataset":'


def test_names_with_line_separators_do_not_tear_rows(evaluate: Evaluate, run: Path) -> None:
    names = ["a\u2028b", "c\x85d", "e", "f"]
    evaluate(names=names)
    evaluate(names=names)
    assert [json.loads(line)["class_names"] for line in (run / "rows.jsonl").read_text().split("\n") if line] == [names]


def test_an_unfinished_run(run: Path) -> None:
    (run / "prompts.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds no prompts.safetensors; train first"):
        evaluate_run(run)


def test_real_images(settings_for: Callable[..., RunSettings], real_data: Callable[..., Path], tmp_path: Path) -> None:
    root = str(real_data("eurosat/split_zhou_EuroSAT.json"))
    settings = settings_for(Path("eurosat"), epochs=1)
    data = settings.data.changed(dataset="eurosat", root=root, shots=1, classes="base")
    folder = train_run(settings.changed(data=data), tmp_path / "run").folder
    assert len(json.loads((folder / "items.json").read_text())["items"]) == 5
    _, row = evaluate_run(folder, classes="novel", only=["River", "Pasture Land"], part="val")
    assert row["images"] > 0
    assert row["dataset"] == "eurosat"


def test_a_run_on_a_disk_that_cannot_be_written(
    evaluate: Evaluate, run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its result is given and evaluated; a full disk is an error."""
    settings = read_settings(run)
    (run / "resume.safetensors").write_bytes(b"left by a process that was killed")
    code = errno.EROFS

    def refuse(path: object, *_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(Path, "unlink", refuse)
    monkeypatch.setattr(tempfile, "mkstemp", lambda **options: refuse(f"{options['dir']}/.maple-abcdefgh.tmp"))
    assert train_run(settings, run).was_finished
    scores, row = evaluate(classes="base")
    assert scores.images == 6
    assert "predictions" not in row
    assert f"{run} cannot be written (Read-only file system): this evaluation is not kept there" in caplog.text
    assert not (run / "rows.jsonl").exists()
    code = errno.ENOSPC
    with pytest.raises(OSError, match=r"No space left on device: .*/predictions/[0-9a-f]{16}\.npz"):
        evaluate(classes="base")
