"""Counts and class names against the published ones, and images one by one."""

import csv
from collections.abc import Callable
from pathlib import Path

import layouts
import pytest

from maple.data import CATALOGUE, Dataset, load_dataset, load_folder
from maple.data.catalogue import require_images
from maple.data.checks import verify as module
from maple.data.checks.verify import (
    Statistics,
    count,
    differences,
    missing_images,
    names_hash,
    published_statistics,
    verify_counts,
    verify_images,
)
from maple.data.emoji import load_emoji
from maple.data.folders.class_folders import rename_classes
from maple.data.published.split_files import read_split
from maple.errors import DataError


@pytest.fixture
def dtd(tmp_path: Path) -> Dataset:
    return load_dataset("dtd", layouts.make("dtd", tmp_path))


def published(names: tuple[str, ...] | None = None, **counts: int | None) -> Statistics:
    return Statistics(dict(counts), names and names_hash(names), "a test")


SMALL = {"train": 6, "val": 2, "test": 4, "test_base": 2, "test_new": 2, "classes": 2}


def test_every_data_set_has_published_numbers() -> None:
    assert list(published_statistics()) == list(CATALOGUE)
    for name, row in published_statistics().items():
        counts = row.counts
        assert counts["classes"]
        assert row.source
        assert (counts["train"] == 0) == CATALOGUE[name].evaluation_only
        if counts["test_base"] is not None and counts["test_new"] is not None:
            assert counts["test_base"] + counts["test_new"] == counts["test"]


def test_the_shipped_numbers_are_the_table_of_the_paper(published_numbers: Path) -> None:
    by_title = {spec.title: name for name, spec in CATALOGUE.items()}
    with (published_numbers / "dataset_stats.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 11
    for row in rows:
        counts = published_statistics()[by_title[row["dataset"]]].counts
        found = (counts["train"], counts["test_base"], counts["test_new"], counts["classes"])
        assert found == tuple(int(row[key]) for key in ("train_full", "test_base", "test_new", "classes"))


@pytest.mark.parametrize("name", ["caltech101", "dtd", "eurosat", "oxford_flowers", "oxford_pets"])
def test_published_split_files_pass(name: str, split_files: Path) -> None:
    contents = read_split(split_files / CATALOGUE[name].labels)
    dataset = Dataset(name, Path(name), *contents)
    assert verify_counts(dataset) == []
    assert count(dataset) == published_statistics()[name].counts
    first = contents.class_names[0]
    (problem,) = verify_counts(rename_classes(dataset, {first: "another"}))
    assert problem.startswith("class names: not the published ones (counted in split_zhou_")


def test_what_differs_is_named(dtd: Dataset) -> None:
    assert verify_counts(dtd, published(("banded", "blotchy"), **SMALL)) == []
    other = published(("blotchy", "banded"), **{**SMALL, "val": None, "train": 7, "test_new": 3})
    assert verify_counts(dtd, other) == [
        "train: 6 found, 7 published (a test)",
        "test_new: 2 found, 3 published (a test)",
        "class names: not the published ones (a test); the first are 'banded', 'blotchy'",
    ]


def test_own_images_have_no_published_numbers(tmp_path: Path) -> None:
    layouts.make("dtd", tmp_path)
    assert verify_counts(load_folder(tmp_path / "dtd/images")) == []


@pytest.mark.parametrize("quick", [True, False])
def test_missing_and_empty_files_are_named_in_order(quick: bool, dtd: Dataset) -> None:
    assert list(verify_images(dtd, quick=quick)) == []
    files = [dtd.file(item) for item in dtd.train]
    files[0].unlink()
    files[2].write_bytes(b"")
    files[3].unlink()
    files[3].mkdir()
    problems = list(verify_images(dtd, quick=quick, workers=3))
    assert [problem.split(":")[0] for problem in problems] == [str(files[position]) for position in (0, 2, 3)]
    assert "there is no such file" in problems[0]
    assert "is empty (0 bytes)" in problems[1]


def test_only_a_full_check_decodes(dtd: Dataset) -> None:
    broken = dtd.file(dtd.test[1])
    broken.write_bytes(broken.read_bytes()[:300])
    assert list(verify_images(dtd, quick=True)) == []
    (problem,) = verify_images(dtd)
    assert problem.startswith(f"{broken}: ")
    assert "damaged" in problem


def test_progress_and_problems_come_as_they_are_found(dtd: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", 5)
    dtd.file(dtd.train[0]).unlink()
    dtd.file(dtd.test[3]).unlink()
    seen: list[tuple[int, int]] = []
    problems = verify_images(dtd, quick=True, on_images=lambda *now: seen.append(now))
    next(problems)
    assert seen == []
    next(problems)
    assert seen == [(5, 12), (10, 12)]
    assert next(problems, None) is None
    assert seen == [(5, 12), (10, 12), (12, 12)]


def test_bundled_images_are_drawn() -> None:
    dataset = load_emoji("emoji-activities")
    small = Dataset(dataset.name, dataset.root, (), (), dataset.test[:20], dataset.class_names, dataset.read)
    assert list(verify_images(small)) == []


def test_a_real_data_set(real_data: Callable[..., Path]) -> None:
    dataset = load_dataset("eurosat", real_data("eurosat/split_zhou_EuroSAT.json"))
    assert verify_counts(dataset) == []
    part = Dataset("eurosat", dataset.root, dataset.train[::100], (), dataset.test[::100], dataset.class_names)
    assert list(verify_images(part)) == []


def test_missing_images_are_counted_without_opening_any(dtd: Dataset) -> None:
    assert missing_images(dtd) == []
    dtd.file(dtd.train[1]).unlink()
    dtd.file(dtd.test[0]).write_bytes(b"")
    assert missing_images(dtd) == [dtd.train[1]]
    assert missing_images(dtd, dtd.test) == []
    (missing,) = [problem for problem in differences(dtd) if problem.startswith("images: ")]
    assert missing == f"images: 1 of 12 are missing in {dtd.root} (the first is {dtd.train[1].path})"
    assert differences(load_emoji("emoji-activities")) == []


@pytest.mark.parametrize("name", layouts.ALL)
def test_an_incomplete_data_set_is_said_once(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Every published one, where it is read."""
    layouts.make(name, tmp_path)
    dataset = load_dataset(name, tmp_path)
    load_dataset(name, tmp_path)
    (line,) = [record.getMessage() for record in caplog.records if "not the published data set" in record.getMessage()]
    assert f"{name} is not the published data set, so results are not comparable with papers: " in line
    assert f"classes: {dataset.num_classes} found, " in line
    assert f"run `maple data prepare {name}`" in line


def test_a_complete_data_set_is_not_mentioned(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(published_statistics(), "dtd", published(("banded", "blotchy"), **SMALL))
    dataset = load_dataset("dtd", layouts.make("dtd", tmp_path))
    assert caplog.records == []
    dataset.file(dataset.test[1]).unlink()
    load_dataset("dtd", tmp_path)
    assert "images: 1 of 12 are missing in " in caplog.text
    require_images(dataset, dataset.train)
    with pytest.raises(DataError, match=r"dtd: images: 1 of 4 are missing in .*; `maple data verify dtd"):
        require_images(dataset, dataset.test)
