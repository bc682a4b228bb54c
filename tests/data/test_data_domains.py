"""Folders of domains."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from data_helpers import save_image

from maple.data import load_dataset
from maple.data.catalogue import canonical_name
from maple.errors import DataError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two domains of three classes; one lacks a class."""
    for domain, classes in (("photo", ("cat", "dog", "eel")), ("sketch", ("cat", "eel"))):
        for name in classes:
            for number in range(8):
                save_image(tmp_path / "animals" / domain / name / f"{number}.png")
    (tmp_path / "animals/readme.txt").write_text("not a domain")
    return tmp_path / "animals"


def test_labels_agree_between_domains(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    photo, sketch = (load_dataset(f"{root}:{domain}", None) for domain in ("photo", "sketch"))
    assert photo.class_names == sketch.class_names == ("cat", "dog", "eel")
    assert (photo.name, sketch.name) == ("animals/photo", "animals/sketch")
    assert (photo.counts()["train"], photo.counts()["test"]) == (18, 6)
    assert {item.label for item in sketch.train} == {item.label for item in sketch.test} == {0, 2}
    assert sketch.file(sketch.test[0]).is_file()
    assert sketch.drawn_split
    assert "domain sketch has no folders of dog" in caplog.text


def test_a_domain_may_be_divided(root: Path) -> None:
    for part, name in (("train", "cat"), ("train", "dog"), ("test", "cat"), ("test", "dog")):
        save_image(root / "paint" / part / name / "1.png")
    paint = load_dataset(f"{root}:paint", None)
    assert paint.class_names == ("cat", "dog", "eel")
    assert paint.counts() == {"train": 2, "val": 0, "test": 2, "classes": 3}
    assert not paint.drawn_split
    assert load_dataset(f"{root}:photo", None).class_names == ("cat", "dog", "eel")


def test_unknown_and_empty_domains(root: Path) -> None:
    with pytest.raises(DataError, match="unknown domain 'sketsh'; choose one of: photo, sketch"):
        load_dataset(f"{root}:sketsh", None)
    with pytest.raises(DataError, match="unknown domain ''; choose one of: photo, sketch"):
        load_dataset(f"{root}:", None)
    (root / "empty").mkdir()
    with pytest.raises(DataError, match="no usable images in class 'cat', 'dog', 'eel'"):
        load_dataset(f"{root}:empty", None)
    with pytest.raises(DataError, match="unknown data set"):
        load_dataset(f"{root / 'nowhere'}:photo", None)


def test_a_folder_with_a_colon_in_its_name_is_a_folder(root: Path) -> None:
    (root / "photo").rename(root.parent / "animals:photo")
    assert load_dataset(f"{root}:photo", None).name == "animals:photo"


def test_domains_taken_for_classes_are_warned_of(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert load_dataset(str(root), None).class_names == ("photo", "sketch")
    assert (
        "all its folders hold the same folders (cat, eel). If these are the classes, and photo, sketch" in caplog.text
    )
    assert f"{root}:photo" in caplog.text
    caplog.clear()
    save_image(root / "photo/1.png")
    load_dataset(str(root), None)
    load_dataset(str(root / "photo"), None)
    assert not caplog.records


def test_splits_without_a_train_folder_are_no_domains(root: Path) -> None:
    (root / "photo").rename(root / "val")
    (root / "sketch").rename(root / "test")
    with pytest.raises(DataError, match=r"holds test, val, but no train folder .*give one of them, such as .*/test"):
        load_dataset(str(root), None)


def test_one_name_for_each_data_set(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root.parent)
    (root / "x.csv").write_text("path,label\n")
    assert canonical_name("animals:photo") == canonical_name(f"{root}/../animals:photo") == f"{root}:photo"
    assert canonical_name("animals") == str(root)
    assert canonical_name("animals/x.csv") == str(root / "x.csv")
    assert canonical_name("eurosat") == "eurosat"
    assert canonical_name("emoji-food/noto") == "emoji-food/noto"
    assert canonical_name("nowhere") == "nowhere"


def test_real_domains(real_data: Callable[..., Path]) -> None:
    pacs = real_data("pacs") / "pacs"
    domains = [load_dataset(f"{pacs}:{name}", None) for name in ("photo", "art_painting", "cartoon")]
    assert {domain.class_names for domain in domains} == {
        ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")
    }
    assert all(domain.counts() == {"train": 210, "val": 0, "test": 70, "classes": 7} for domain in domains)
