"""Splits drawn here: classes and counts as published, images at random, and never taken for the published ones."""

import json
from collections import Counter
from pathlib import Path

import layouts
import pytest
from data_helpers import save_image
from typer.testing import CliRunner

from maple.cli import app
from maple.data import load_dataset
from maple.data.catalogue import CATALOGUE, draw_published_split
from maple.data.checks.verify import verify_counts
from maple.data.published.split_files import DRAWS, Draw, draw_split
from maple.errors import DataError

PINNED = (8, 7, 4, 1, 2)
CALTECH = {"Motorbikes": 8, "accordion": 3, "Faces": 5, "Faces_easy": 5, "airplanes": 10, "BACKGROUND_Google": 4}


@pytest.fixture
def caltech(tmp_path: Path) -> Path:
    """Caltech101 as its archive unpacks: with clutter, and with a file that is not an image."""
    folder = tmp_path / "caltech-101" / "101_ObjectCategories"
    for name, count in CALTECH.items():
        for number in range(count):
            save_image(folder / name / f"image_{number:04}.jpg")
    (folder / "BACKGROUND_Google" / "tmp").write_bytes(b"")
    (folder / "accordion" / "Thumbs.db").write_bytes(b"x")
    (folder / ".DS_Store").write_bytes(b"x")
    (folder / "__MACOSX" / "accordion").mkdir(parents=True)
    (folder / "__MACOSX" / "accordion" / "._image_0001.jpg").write_bytes(b"x")
    return tmp_path


def test_classes_names_and_counts_are_the_published_ones(caltech: Path) -> None:
    draw_published_split("caltech101", caltech, 1)
    dataset = load_dataset("caltech101", caltech)
    assert dataset.class_names == ("face", "motorbike", "accordion", "airplane"), "by folder, capitals first"
    counts = {part: Counter(item.class_name for item in getattr(dataset, part)) for part in ("train", "val", "test")}
    # round() takes the even neighbour of 2.5 and of 1.5.
    assert counts["train"] == {"face": 2, "motorbike": 4, "accordion": 2, "airplane": 5}
    assert counts["val"] == {"face": 1, "motorbike": 2, "accordion": 1, "airplane": 2}
    assert counts["test"] == {"face": 2, "motorbike": 2, "airplane": 3}
    everything = [item.path for item in (*dataset.train, *dataset.val, *dataset.test)]
    assert len(set(everything)) == len(everything) == 26


def test_a_seed_gives_one_split(caltech: Path) -> None:
    images = caltech / "caltech-101" / "101_ObjectCategories"
    splits = [draw_split(images, DRAWS["caltech101"], seed) for seed in (1, 1, 2)]
    assert splits[0] == splits[1] != splits[2]
    first = [item.path for item in splits[0].train if item.class_name == "airplane"]
    assert first != sorted(first), "shuffled, since samples follow the order"
    assert first == [f"airplanes/image_000{number}.jpg" for number in PINNED], "the same on every machine"


def test_it_is_never_taken_for_the_published_one(caltech: Path) -> None:
    path = draw_published_split("caltech101", caltech, 1)
    dataset = load_dataset("caltech101", caltech)
    assert (path.name, dataset.name) == ("split_drawn_Caltech101.json", "caltech101 (drawn split)")
    assert verify_counts(dataset) == []
    assert json.loads(path.read_text())["drawn"] == {"seed": 1, "by": "maple data split"}
    published = {part: [["accordion/image_0000.jpg", 0, "accordion"]] for part in ("train", "val", "test")}
    (path.parent / "split_zhou_Caltech101.json").write_text(json.dumps(published))
    assert load_dataset("caltech101", caltech).name == "caltech101", "where both are, the published one is read"
    with pytest.raises(DataError, match="the published split is there"):
        draw_published_split("caltech101", caltech, 1)


def test_another_draw_does_not_slip_under_runs(caltech: Path) -> None:
    path = draw_published_split("caltech101", caltech, 1)
    before = path.read_bytes()
    assert draw_published_split("caltech101", caltech, 1).read_bytes() == before
    with pytest.raises(DataError, match="another split was drawn before"):
        draw_published_split("caltech101", caltech, 2)
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", layouts.SPLIT_LAYOUTS)
def test_what_is_said_without_a_split(name: str, tmp_path: Path) -> None:
    layouts.make(name, tmp_path)
    (tmp_path / CATALOGUE[name].folder / CATALOGUE[name].labels).unlink()
    with pytest.raises(DataError, match=f"split_zhou_.* is missing; `maple data prepare {name}` fetches it") as error:
        load_dataset(name, tmp_path)
    assert (f"`maple data split {name}`" in str(error.value)) == (name in DRAWS)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("oxford_pets", "the split of oxford_pets is not drawn from its folders; choose one of: caltech101, "),
        ("mine", "unknown published data set 'mine'; choose one of: caltech101, "),
        ("dtd", "images: the folder is missing"),
    ],
)
def test_refused(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        draw_published_split(name, tmp_path, 1)


def test_folders_that_cannot_be_split(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no folders of classes"):
        draw_split(tmp_path, Draw(), 1)
    save_image(tmp_path / "banded" / "1.jpg")
    with pytest.raises(DataError, match="banded: has 1 images, too few for train, val and test"):
        draw_split(tmp_path, Draw(), 1)


def test_archives_that_were_not_unpacked_are_named(tmp_path: Path) -> None:
    (tmp_path / "caltech-101").mkdir()
    (tmp_path / "caltech-101" / "101_ObjectCategories.tar.gz").write_bytes(b"x")
    with pytest.raises(DataError, match=r"101_ObjectCategories.tar.gz in .*caltech-101 must be unpacked there first"):
        load_dataset("caltech101", tmp_path)


def test_the_command(caltech: Path) -> None:
    done = CliRunner().invoke(app, ["data", "split", "caltech101", "--data-root", str(caltech)])
    assert done.exit_code == 0, done.output
    assert "(train 13, val 6, test 7, classes 4)" in done.stdout
    assert "called 'caltech101 (drawn split)' in results" in done.stdout
