"""Published data sets: split files, layouts, counts."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data_helpers import save_image

from maple.data import CATALOGUE, load_dataset, select_dataset
from maple.data.published.split_files import read_split
from maple.errors import DataError

ROWS = {
    "train": [["Forest/1.jpg", 0, "Forest"], ["River/1.jpg", 1, "River_bed"]],
    "val": [],
    "test": [["River/2.jpg", 1, "River_bed"]],
}


@pytest.fixture
def eurosat(tmp_path: Path) -> Path:
    save_image(tmp_path / "eurosat/2750/Forest/1.jpg")
    (tmp_path / "eurosat/split_zhou_EuroSAT.json").write_text(json.dumps(ROWS))
    return tmp_path


def test_a_published_data_set_is_read_by_name(eurosat: Path) -> None:
    dataset = load_dataset("eurosat", eurosat)
    assert dataset.name == "eurosat"
    assert dataset.class_names == ("Forest", "River_bed")
    assert dataset.file(dataset.train[0]) == eurosat / "eurosat/2750/Forest/1.jpg"
    assert dataset.counts() == {"train": 2, "val": 0, "test": 1, "classes": 2}


def test_class_names_rename_published_classes(eurosat: Path) -> None:
    dataset = load_dataset("eurosat", eurosat, class_names={"River_bed": "a river"})
    assert dataset.class_names == ("Forest", "a river")
    assert dataset.test[0].class_name == "a river"
    with pytest.raises(DataError, match="renames 'Lake', which 'eurosat' does not have; its classes are: Forest"):
        load_dataset("eurosat", eurosat, class_names={"Lake": "a lake"})


def test_unknown_name_lists_the_known_ones_and_says_that_a_folder_works(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"unknown data set 'eurosta'; choose one of: .*eurosat.*path of an existing"):
        load_dataset("eurosta", tmp_path)


def test_missing_pieces_say_what_is_expected_where(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="give the folder that holds eurosat/"):
        load_dataset("eurosat", None)
    with pytest.raises(DataError, match="the data root is missing"):
        load_dataset("eurosat", tmp_path / "nowhere")
    with pytest.raises(DataError, match="the folder of EuroSAT is missing"):
        load_dataset("eurosat", tmp_path)
    (tmp_path / "eurosat").mkdir()
    with pytest.raises(DataError, match=r"2750: its image folder is missing; .*split_zhou_EuroSAT.json next to it"):
        load_dataset("eurosat", tmp_path)
    (tmp_path / "eurosat/2750").mkdir()
    with pytest.raises(
        DataError, match=r"the published split_zhou_EuroSAT.json is missing; `maple data prepare eurosat`"
    ):
        load_dataset("eurosat", tmp_path)
    (tmp_path / "eurosat/split_zhou_EuroSAT.json").write_text(json.dumps(ROWS))
    with pytest.raises(DataError, match=r"1.jpg: the first image of EuroSAT is missing"):
        load_dataset("eurosat", tmp_path)


def _without_test(rows: dict[str, Any]) -> None:
    del rows["test"]


def _two_names(rows: dict[str, Any]) -> None:
    rows["test"][0][2] = "Lake"


def _gap(rows: dict[str, Any]) -> None:
    for part in ("train", "test"):
        rows[part][-1][1] = 2


def _empty(rows: dict[str, Any]) -> None:
    for part in rows:
        rows[part] = []


def _row(row: Any) -> Callable[[dict[str, Any]], None]:
    def change(rows: dict[str, Any]) -> None:
        rows["val"] = [row]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without_test, 'lists "train", "val" and "test"'),
        (_two_names, r"test\[0\] calls class 1 'Lake', an earlier row calls it 'River_bed'"),
        (_gap, r"labels \[1\] have no items"),
        (_row(["a.jpg", 0]), r"val\[0\] is \['a.jpg', 0\]; a row must be"),
        (_row(["a.jpg", "0", "Forest"]), "a row must be"),
        (_row(["a.jpg", True, "Forest"]), "a row must be"),
        (_row(["a.jpg", -1, "Forest"]), "a row must be"),
        (_row(["", 0, "Forest"]), "a row must be"),
        (_row("a.jpg"), "a row must be"),
        (_empty, "holds no images in any of its splits"),
    ],
)
def test_malformed_split_files_are_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    rows = json.loads(json.dumps(ROWS))
    change(rows)
    path = tmp_path / "split.json"
    path.write_text(json.dumps(rows))
    with pytest.raises(DataError, match=message) as caught:
        read_split(path)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[1]", b"[" * 100_000])
def test_split_files_that_are_no_json_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "split.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"unreadable or damaged|should hold a JSON object"):
        read_split(path)


def test_a_path_outside_the_images_is_refused(eurosat: Path) -> None:
    rows = {**ROWS, "val": [["../../secret.jpg", 0, "Forest"]]}
    (eurosat / "eurosat/split_zhou_EuroSAT.json").write_text(json.dumps(rows))
    with pytest.raises(DataError, match="must be inside the root"):
        load_dataset("eurosat", eurosat)


def test_a_split_file_that_was_written_on_windows(eurosat: Path) -> None:
    rows = {**ROWS, "train": [["\\Forest\\1.jpg", 0, "Forest"], ["River\\1.jpg", 1, "River_bed"]]}
    (eurosat / "eurosat/split_zhou_EuroSAT.json").write_text(json.dumps(rows))
    assert [item.path for item in load_dataset("eurosat", eurosat).train] == ["Forest/1.jpg", "River/1.jpg"]
    rows["train"][0][0] = "..\\..\\secret.jpg"
    (eurosat / "eurosat/split_zhou_EuroSAT.json").write_text(json.dumps(rows))
    with pytest.raises(DataError, match="must be inside the root"):
        load_dataset("eurosat", eurosat)


def test_every_entry_of_the_catalogue_is_complete() -> None:
    assert len({spec.folder for spec in CATALOGUE.values()}) == len(CATALOGUE) == 15
    assert sum(spec.labels.startswith("split_zhou_") for spec in CATALOGUE.values()) == 9
    assert all(spec.template.count("{}") == 1 for spec in CATALOGUE.values())


def test_templates_are_the_published_ones(published_numbers: Path) -> None:
    with (published_numbers / "zeroshot_templates.csv").open(newline="") as file:
        published = {row["dataset"]: row["template"] for row in csv.DictReader(file)}
    titles = {"DTD": "DescribableTextures", "Flowers102": "OxfordFlowers"}
    for spec in CATALOGUE.values():
        assert spec.template == published[titles.get(spec.title, spec.title)]


@pytest.mark.parametrize("name", ["caltech101", "dtd", "eurosat", "oxford_flowers", "oxford_pets"])
def test_counts_are_the_published_ones(name: str, tmp_path: Path, split_files: Path, published_numbers: Path) -> None:
    spec = CATALOGUE[name]
    with (published_numbers / "dataset_stats.csv").open(newline="") as file:
        stats = next(row for row in csv.DictReader(file) if row["dataset"] == spec.title)
    split = split_files / spec.labels
    first = read_split(split).train[0]
    save_image(tmp_path / spec.folder / spec.images / first.path)
    (tmp_path / spec.folder / spec.labels).write_bytes(split.read_bytes())
    dataset = load_dataset(name, tmp_path)
    base, novel = select_dataset(dataset, "base"), select_dataset(dataset, "novel")
    found = {
        "train_full": len(dataset.train),
        "test_base": len(base.test),
        "test_new": len(novel.test),
        "classes": dataset.num_classes,
        "base_classes": base.num_classes,
        "new_classes": novel.num_classes,
    }
    assert found == {key: int(stats[key]) for key in found}


def test_eurosat_is_complete_on_disk(real_data: Callable[..., Path]) -> None:
    dataset = load_dataset("eurosat", real_data("eurosat/split_zhou_EuroSAT.json"))
    assert dataset.counts() == {"train": 13500, "val": 5400, "test": 8100, "classes": 10}
    assert all(dataset.file(item).is_file() for item in dataset.train[::50] + dataset.test[::50])
