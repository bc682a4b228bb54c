"""An evaluation never counts an image that the run was trained on as unseen, whatever happens to the images."""

import csv
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from maple.config import RunSettings
from maple.errors import CheckpointError, DataError
from maple.fitting import fit
from maple.runs import evaluate_run, train_run
from maple.runs.trained_images import TRAINED_IMAGES, TrainedImages

CLASSES = ("cat", "dog", "eel")


def draw(folder: Path, name: str, seed: int) -> None:
    """Write one image of noise, unlike any other."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (40, 40, 3))
    Image.fromarray(pixels.astype(np.uint8)).save(folder / name)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for label, name in enumerate(CLASSES):
        for index in range(8):
            draw(tmp_path / "images" / name, f"{index}.png", 100 * label + index)
    return tmp_path / "images"


@pytest.fixture
def train(settings_for: Callable[..., RunSettings], tmp_path: Path) -> Callable[..., Path]:
    def train(source: Path | str, shots: int | None = None, output: str = "run") -> Path:
        settings = settings_for(source, epochs=1)
        return train_run(settings.changed(data=settings.data.changed(shots=shots)), tmp_path / output).folder

    return train


def files_of_training(run: Path, images: Path) -> set[bytes]:
    items = json.loads((run / "items.json").read_text())["items"]
    return {(images / item["path"]).read_bytes() for item in items}


def evaluated_files(run: Path, row: dict[str, Any], root: Path) -> list[bytes]:
    with np.load(run / row["predictions"], allow_pickle=False) as arrays:
        return [(root / str(path)).read_bytes() for path in arrays["paths"]]


def test_the_division_is_kept_when_images_come_and_go(
    train: Callable[..., Path], images: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = train(images)
    _, before = evaluate_run(run)
    assert not caplog.records
    trained = files_of_training(run, images)
    for name in CLASSES:
        draw(images / name, "0a.png", 1000 + CLASSES.index(name))
        draw(images / name, "9.png", 3000 + CLASSES.index(name))
    scores, row = evaluate_run(run)
    tested = evaluated_files(run, row, images)
    assert scores.images == before["images"] + 6 == len(tested)
    assert not trained & set(tested)
    assert "the images have changed since the training: 6 images more" in caplog.text
    removed = next(path for path in sorted(images.glob("cat/?.png")) if path.read_bytes() in set(tested))
    removed.unlink()
    assert evaluate_run(run)[0].images == scores.images - 1
    assert "1 image gone" in caplog.text


def test_a_trained_image_is_known_under_another_name(train: Callable[..., Path], images: Path) -> None:
    run = train(images)
    before = evaluate_run(run)[0].images
    trained = files_of_training(run, images)
    for path in sorted(images.glob("*/*.png")):
        if path.read_bytes() in trained:
            path.rename(path.with_name(f"renamed_{path.name}"))
    scores, row = evaluate_run(run)
    assert scores.images == before
    assert not trained & set(evaluated_files(run, row, images))


@pytest.mark.parametrize("way", ["moved", "copied", "linked", "table"])
def test_trained_images_are_left_out_wherever_they_are(
    train: Callable[..., Path], images: Path, tmp_path: Path, way: str, caplog: pytest.LogCaptureFixture
) -> None:
    run = train(images, shots=2)
    trained = files_of_training(run, images)
    place = tmp_path / "elsewhere" / "photos"
    place.parent.mkdir()
    if way == "linked":
        place.mkdir()
        for number, path in enumerate(sorted(images.glob("*/*.png"))):
            (place / path.parent.name).mkdir(exist_ok=True)
            (place / path.parent.name / f"link{number}.png").symlink_to(path)
    else:
        shutil.copytree(images, place)
    if way == "moved":
        shutil.rmtree(images)
    source = place
    if way == "table":
        source = place / "images.csv"
        with source.open("w", newline="") as file:
            rows = [(path.relative_to(place), path.parent.name) for path in sorted(place.glob("*/*.png"), reverse=True)]
            csv.writer(file).writerows([("path", "label"), *rows])
    scores, row = evaluate_run(run, dataset=str(source))
    assert scores.images == 24 - 6
    assert not trained & set(evaluated_files(run, row, place))
    assert "6 of 24 images were trained on and left out" in caplog.text
    scores, _ = evaluate_run(run, dataset=str(source), part="all")
    assert scores.images == 24
    assert "6 of 24 images were trained on; they are counted" in caplog.text


def test_a_folder_of_trained_images_alone_is_refused(train: Callable[..., Path], images: Path, tmp_path: Path) -> None:
    run = train(images)
    for item in json.loads((run / "items.json").read_text())["items"]:
        (tmp_path / "seen" / item["class_name"]).mkdir(parents=True, exist_ok=True)
        shutil.copy(images / item["path"], tmp_path / "seen" / item["path"])
    with pytest.raises(DataError, match="all 18 images were trained on"):
        evaluate_run(run, dataset=str(tmp_path / "seen"))


def test_zero_shot_clip_was_trained_on_nothing(
    settings_for: Callable[..., RunSettings], images: Path, tmp_path: Path
) -> None:
    settings = settings_for(images).changed(method={"name": "zero_shot"})
    run = train_run(settings, tmp_path / "run").folder
    shutil.copytree(images, tmp_path / "copy")
    assert evaluate_run(run, dataset=str(tmp_path / "copy"))[0].images == 24


def test_the_columns_of_a_run_are_those_of_tables(
    settings_for: Callable[..., RunSettings], images: Path, tmp_path: Path
) -> None:
    rows = [f"{path.relative_to(images)},{path.parent.name},animal\n" for path in sorted(images.glob("*/*.png"))]
    (images / "images.csv").write_text("path,species,label\n" + "".join(rows))
    settings = settings_for(images / "images.csv").changed(method={"name": "zero_shot"})
    run = train_run(settings.changed(data=settings.data.changed(label_column="species")), tmp_path / "run").folder
    shutil.copytree(images, tmp_path / "copy")
    for dataset in ("copy", "copy/images.csv"):
        scores, row = evaluate_run(run, dataset=str(tmp_path / dataset))
        assert (scores.images, row["class_names"]) == (24, list(CLASSES))


def test_a_row_of_a_table_that_moves_to_the_test_split(train: Callable[..., Path], images: Path) -> None:
    table = images / "images.csv"
    paths = sorted(images.glob("*/*.png"))

    def write(test: Callable[[int], bool]) -> None:
        rows = [(p.relative_to(images), p.parent.name, "test" if test(n) else "train") for n, p in enumerate(paths)]
        with table.open("w", newline="") as file:
            csv.writer(file).writerows([("path", "label", "split"), *rows])

    write(lambda number: number % 4 == 0)
    run = train(table)
    write(lambda number: number % 2 == 0)
    scores, row = evaluate_run(run)
    assert scores.images == 6
    assert not files_of_training(run, images) & set(evaluated_files(run, row, images))


def test_runs_of_earlier_versions_know_the_paths(train: Callable[..., Path], images: Path, tmp_path: Path) -> None:
    run = train(images)
    for name in (TRAINED_IMAGES, "images.json"):
        (run / name).unlink()
    shutil.copytree(images, tmp_path / "copy")
    assert evaluate_run(run, dataset=str(tmp_path / "copy"))[0].images == 6
    for name in CLASSES:
        for number in range(3):
            draw(images / name, f"0{number}.png", 5000 + 10 * CLASSES.index(name) + number)
    _, row = evaluate_run(run)
    assert not files_of_training(run, images) & set(evaluated_files(run, row, images))
    shutil.rmtree(images)
    assert evaluate_run(run, dataset=str(tmp_path / "copy"))[0].images == 6  # by the paths in the folder


@pytest.mark.parametrize("content", ["[]", "{}", '{"images": [1]}', '{"images": {"a": [1]}}', "{"])
def test_damaged_records(train: Callable[..., Path], images: Path, content: str) -> None:
    run = train(images)
    (run / TRAINED_IMAGES).write_text(content)
    with pytest.raises(CheckpointError, match="damaged"):
        TrainedImages(run)


def test_the_folder_of_the_images_is_gone(train: Callable[..., Path], images: Path) -> None:
    run = train(images)
    images.rename(images.with_name("moved"))
    with pytest.raises(DataError, match=r"the images of this run were in .*images, which is gone.* dataset=FOLDER"):
        evaluate_run(run)


def test_a_finished_run_says_that_the_images_have_changed(
    settings_for: Callable[..., RunSettings], images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = settings_for(images, epochs=1)
    train_run(settings, tmp_path / "run")
    fit(settings, tmp_path / "fit")
    for path in images.glob("*/*.png"):
        path.touch()
    assert train_run(settings, tmp_path / "run").was_finished
    assert fit(settings, tmp_path / "fit").was_finished
    assert "changed" not in caplog.text
    draw(images / "fox", "1.png", 9005)
    draw(images / "cat", "new.png", 9006)
    (images / "dog" / "3.png").unlink()
    Image.new("RGB", (50, 50)).save(images / "eel" / "2.png")
    expected = "have changed since: 1 class more, 2 images more, 1 image gone, 1 image with other content"
    for again in (lambda: train_run(settings, tmp_path / "run"), lambda: fit(settings, tmp_path / "fit")):
        caplog.clear()
        assert again().was_finished
        assert expected in caplog.text


def test_images_that_a_fit_left_out_are_not_new(
    settings_for: Callable[..., RunSettings], images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copy(images / "cat" / "0.png", images / "cat" / "copy.png")
    (images / "dog" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n not an image")
    (images / "fox").mkdir()
    settings = settings_for(images, epochs=1)
    settings = settings.changed(data=settings.data.changed(class_names={"fox": "red fox", "eel": "long eel"}))
    fit(settings, tmp_path / "fit")
    assert "changed" not in caplog.text
    caplog.clear()
    assert fit(settings, tmp_path / "fit").was_finished
    evaluate_run(tmp_path / "fit")
    evaluate_run(tmp_path / "fit" / "zero_shot")
    assert not caplog.records


def test_fewer_classes_are_measured_among_the_trained_names(
    train: Callable[..., Path], images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = train(images)
    draw(tmp_path / "batch" / "Eel", "1.png", 9001)
    scores, row = evaluate_run(run, dataset=str(tmp_path / "batch"))
    assert (scores.images, row["class_names"]) == (1, list(CLASSES))
    assert [sum(counts) for counts in scores.confusion] == [0, 0, 1]
    assert "images of 1 of the 3 trained classes; all 3 names are possible answers" in caplog.text
    draw(tmp_path / "batch" / "cat", "1.png", 9002)
    assert evaluate_run(run, dataset=str(tmp_path / "batch"), only=["eel", "cat"])[1]["class_names"] == ["cat", "eel"]
    given: dict[str, Any] = {"class_names": {"cat": "kitten"}, "root": "/elsewhere"}
    asked = evaluate_run(run, dataset=str(tmp_path / "batch"), **given)[1]["asked"]
    assert {key: asked[key] for key in given} == given
    draw(tmp_path / "batch" / "wolf", "1.png", 9003)
    caplog.clear()
    assert evaluate_run(run, dataset=str(tmp_path / "batch"))[1]["class_names"] == ["Eel", "cat", "wolf"]
    assert "wolf was not trained, so the possible answers are its own 3 names" in caplog.text
    draw(tmp_path / "one" / "wolf", "1.png", 9004)
    with pytest.raises(DataError, match="only one class, 'wolf', which is not one of those trained"):
        evaluate_run(run, dataset=str(tmp_path / "one"))


def test_names_of_numbered_folders_follow_the_numbers(
    settings_for: Callable[..., RunSettings], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(12):
        for index in range(2):
            draw(tmp_path / "byid" / str(number), f"{index}.png", 10 * number + index)
    settings = settings_for(tmp_path / "byid").changed(method={"name": "zero_shot"})
    run = train_run(settings, tmp_path / "run").folder
    names = [f"name {number}" for number in range(12)]
    with caplog.at_level(logging.WARNING):
        row = evaluate_run(run, names=names, part="all")[1]
    assert row["class_names"][:4] == ["name 0", "name 1", "name 10", "name 11"]
    assert "0 = name 0, 1 = name 1, 2 = name 2" in caplog.text
