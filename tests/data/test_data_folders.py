"""Folders of a user's own images."""

import logging
import os
import re
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data_helpers import save_image
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from maple.data import Dataset, Item, load_dataset, load_folder, open_source
from maple.data.checks.findings import Finding
from maple.data.folders.class_folders import draw_split, rename_classes
from maple.errors import ConfigError, DataError
from maple.inference.sources.image_sources import find_images


def make_classes(root: Path, counts: dict[str, int]) -> Path:
    for name, count in counts.items():
        for index in range(count):
            save_image(root / name / f"{index}.png", index)
    return root


def test_class_named_folders_are_a_data_set(tmp_path: Path) -> None:
    make_classes(tmp_path / "pets", {"zebra_fish": 4, "Cat": 8, "dog": 1})
    dataset = load_dataset(str(tmp_path / "pets"), None)
    assert dataset.name == "pets"
    assert dataset.class_names == ("Cat", "dog", "zebra_fish")
    assert dataset.counts() == {"train": 10, "val": 0, "test": 3, "classes": 3}
    assert [item.class_name for item in dataset.test] == ["Cat", "Cat", "zebra_fish"]
    assert all(dataset.file(item).is_file() for item in dataset.train + dataset.test)


def test_images_may_lie_deeper_in_their_class(tmp_path: Path) -> None:
    make_classes(tmp_path, {"a": 1, "b": 1})
    save_image(tmp_path / "a/2024/may/x.jpg")
    dataset = load_folder(tmp_path, test_fraction=0)
    assert [item.path for item in dataset.train] == ["a/0.png", "a/2024/may/x.jpg", "b/0.png"]


def test_the_split_does_not_depend_on_the_order_of_the_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_classes(tmp_path, {"a": 9, "b": 12})
    first = load_folder(tmp_path, seed=3)
    listdir = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: sorted(listdir(path), reverse=True))
    assert load_folder(tmp_path, seed=3) == first
    assert load_folder(tmp_path, seed=4) != first
    assert load_folder(tmp_path, seed=0) == load_folder(tmp_path)


def test_another_class_leaves_the_split_of_the_others_alone(tmp_path: Path) -> None:
    make_classes(tmp_path, {"b": 9, "c": 9})
    before = {item.path for item in load_folder(tmp_path).test}
    make_classes(tmp_path, {"a": 9})
    assert before < {item.path for item in load_folder(tmp_path).test}


@given(
    count=st.integers(1, 60),
    seed=st.integers(0, 99),
    val=st.floats(0, 0.5, exclude_max=True),
    test=st.floats(0, 0.5),
)
def test_a_split_is_a_partition_that_keeps_an_image_for_training(
    count: int, seed: int, val: float, test: float
) -> None:
    paths = [f"{index:03}" for index in range(count)]
    parts = draw_split({"a": paths}, seed, val, test)
    assert sorted(parts["train"]["a"] + parts["val"]["a"] + parts["test"]["a"]) == paths
    assert parts["train"]["a"]
    if test > 0 and count > 1:
        assert parts["test"]["a"]


def test_train_val_and_test_folders_are_used_as_they_stand(tmp_path: Path) -> None:
    make_classes(tmp_path / "Train", {"a": 3, "b": 3})
    make_classes(tmp_path / "valid", {"a": 1, "b": 1})
    make_classes(tmp_path / "TEST", {"a": 2, "b": 2})
    dataset = load_folder(tmp_path)
    assert dataset.counts() == {"train": 6, "val": 2, "test": 4, "classes": 2}
    assert dataset.test[0].path == "TEST/a/0.png"


def test_a_val_folder_alone_is_the_test_part(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_classes(tmp_path / "train", {"a": 3, "b": 3})
    make_classes(tmp_path / "val", {"a": 1})
    with caplog.at_level(logging.INFO):
        dataset = load_folder(tmp_path)
    assert (len(dataset.val), len(dataset.test)) == (0, 1)
    assert "its val folder is the test split" in caplog.text
    assert "has no images of 'b'" in caplog.text


def test_parts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    make_classes(tmp_path / "train", {"a": 1, "b": 1})
    (tmp_path / "test").mkdir()
    with pytest.raises(DataError, match="the test split holds no images"):
        load_folder(tmp_path)
    make_classes(tmp_path / "test", {"c": 1})
    with pytest.raises(DataError, match="lacks classes of the test split: 'c'"):
        load_folder(tmp_path)
    make_classes(tmp_path / "validation", {"a": 1})
    make_classes(tmp_path / "val", {"a": 1})
    with pytest.raises(DataError, match="val and validation both look like the val split"):
        load_folder(tmp_path)


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("Training", "Testing"),
        ("TRAIN", "TEST"),
        ("seg_train/seg_train", "seg_test/seg_test"),
        ("train_set", "test_set"),
        ("trainset", "testset"),
        ("train", "Testing"),
        ("Training", "validation"),
        ("train2017", "val2017"),
        ("Train_Alphabet", "Test_Alphabet"),
        ("brain train images", "brain eval images"),
        ("train/train", "dev/dev"),
    ],
)
def test_splits_are_recognised_by_their_words(tmp_path: Path, train: str, test: str) -> None:
    make_classes(tmp_path / train, {"sea": 3, "street": 3})
    make_classes(tmp_path / test, {"sea": 2, "street": 2})
    make_classes(tmp_path, {"seg_pred": 2})
    dataset = load_folder(tmp_path)
    assert dataset.class_names == ("sea", "street")
    assert (len(dataset.train), len(dataset.test), dataset.drawn_split) == (6, 4, False)
    assert all(dataset.file(item).is_file() for item in dataset.train)


def test_two_folders_of_one_split_are_refused(tmp_path: Path) -> None:
    for folder in ("Training", "train_set", "Testing"):
        make_classes(tmp_path / folder, {"sea": 2, "street": 2})
    with pytest.raises(DataError, match="Training and train_set both look like the train split; keep one"):
        load_folder(tmp_path)
    (tmp_path / "Training").rename(tmp_path / "train")
    assert len(load_folder(tmp_path).train) == 4


@pytest.mark.parametrize(
    "classes",
    [
        ("training", "testing"),
        ("train 1", "train 2", "test 1"),
        ("toy train", "test tube"),
        ("Training/2021", "Testing/2022"),
        ("Training/on_site", "Training/online", "Testing"),
    ],
)
def test_classes_may_have_the_names_of_splits(tmp_path: Path, classes: tuple[str, ...]) -> None:
    make_classes(tmp_path, dict.fromkeys(classes, 2))
    assert set(load_folder(tmp_path).class_names) == {name.partition("/")[0] for name in classes}


def test_images_in_split_folders_need_class_folders(tmp_path: Path) -> None:
    make_classes(tmp_path / "pets", {"train": 2, "test": 2})
    expected = "pets/train/CLASS/image.jpg; if train is a class, give a table of path and label"
    with pytest.raises(DataError, match=expected):
        load_folder(tmp_path / "pets")


@pytest.mark.parametrize(
    ("folders", "level", "text"),
    [
        (("animals/cat", "animals/dog", "vehicles/bus", "vehicles/car"), "warning", "animals: cat, dog; vehicles: bus"),
        (("Training/mild", "Training/severe", "Testing"), "warning", "(Training: mild, severe)"),
        (("cat/2021-01", "cat/2021-02", "dog/2021-03", "dog/2021-04"), "note", "(cat: 2021-01, 2021-02; dog: "),
        (("cat/canon", "cat/nikon", "dog/canon", "dog/sony"), "note", "images are of the class 'cat', 'dog'"),
        (("bird", "cat", "dog/adult", "dog/puppy"), "note", "1 class folder holds only folders (dog: adult, puppy)"),
        (("cat/cat", "dog/dog"), "", ""),
        (("cat", "cat/small", "dog", "dog/large"), "", ""),
    ],
)
def test_folders_in_class_folders_are_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, folders: tuple[str, ...], level: str, text: str
) -> None:
    make_classes(tmp_path, dict.fromkeys(folders, 2))
    findings: list[Finding] = []
    assert len(load_folder(tmp_path, on_finding=findings.append, test_fraction=0).train) == 2 * len(folders)
    assert [finding.level for finding in findings] == [level] * bool(level)
    assert all(text in finding.text for finding in findings)
    with caplog.at_level(logging.WARNING):
        load_folder(tmp_path)
    assert ("if the folders inside are the classes, give a table" in caplog.text) == (level == "warning")


def test_links_that_lead_nowhere_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_classes(tmp_path / "pets", {"cat": 3, "dog": 3})
    (tmp_path / "pets/owl").mkdir()
    for name in ("cat", "dog", "owl"):
        (tmp_path / f"pets/{name}/gone.jpg").symlink_to("/mnt/share/gone.jpg")
    (tmp_path / "pets/eel").symlink_to("../nowhere")
    text = "4 links lead nowhere (1 in pets, 1 in cat, 1 in dog and 1 more; eel -> ../nowhere): is the drive or share"
    with pytest.raises(DataError, match=rf"no usable images in class 'owl'.*; {re.escape(text)}"):
        load_folder(tmp_path / "pets")
    dataset = load_folder(tmp_path / "pets", drop_empty=True)
    assert dataset.class_names == ("cat", "dog")
    assert text in caplog.text
    shutil.rmtree(tmp_path / "pets/cat")
    with pytest.raises(DataError, match=r"images of only one class, 'dog', .*; 3 links lead nowhere"):
        load_folder(tmp_path / "pets", drop_empty=True)
    (tmp_path / "link").symlink_to("/mnt/share")
    with pytest.raises(DataError, match="is a link to /mnt/share, which is not there; is the drive"):
        load_dataset(str(tmp_path / "link"), None)


def test_folders_that_cannot_be_searched_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a folder that may be listed, but not searched, and on a share whose server does not respond."""
    make_classes(tmp_path, {"cat": 2, "dog": 2, "owl": 2})
    stat = os.stat

    def denied(path: Any, *arguments: Any, **options: Any) -> os.stat_result:
        if "owl/" in os.fspath(path):
            raise PermissionError(13, "Permission denied", path)
        return stat(path, *arguments, **options)

    monkeypatch.setattr(os, "stat", denied)
    findings: list[Finding] = []
    assert load_folder(tmp_path, drop_empty=True, on_finding=findings.append).class_names == ("cat", "dog")
    assert findings[0].text == "2 files cannot be reached (2 in owl; owl/0.png): check the permissions of these folders"


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    make_classes(tmp_path, {"train": 2, "car": 2})
    assert load_folder(tmp_path).class_names == ("car", "train")


def test_litter_is_skipped_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_classes(tmp_path, {"a": 2, "b": 2})
    for unexpected_files in (".hidden/x.png", "__MACOSX/x.png", "a/.thumbs/x.png", "a/._0.png"):
        save_image(tmp_path / unexpected_files)
    for text in ("a/notes.txt", "a/BM.md", "b/labels.csv", "a/Thumbs.db", "b/desktop.ini", "readme.txt", "b/.DS_Store"):
        (tmp_path / text).write_text("BM P1 text")
    with caplog.at_level(logging.INFO):
        dataset = load_folder(tmp_path)
    assert dataset.class_names == ("a", "b")
    assert len(dataset.train + dataset.test) == 4
    assert "skipped 3 files (not an image)" in caplog.text
    assert "skipped 1 files (outside a class folder)" in caplog.text


def test_images_are_recognised_by_extension_or_signature(tmp_path: Path) -> None:
    make_classes(tmp_path, {"a": 1, "b": 1})
    shutil.copy(tmp_path / "a/0.png", tmp_path / "a/no_extension")
    shutil.copy(tmp_path / "a/0.png", tmp_path / "a/photo.download")
    for extension in ("JPG", "jpeg", "webp", "gif", "bmp", "tif"):
        save_image(tmp_path / f"b/x.{extension}")
    dataset = load_folder(tmp_path, test_fraction=0)
    assert len(dataset.train) == 10


def test_symbolic_links_are_followed_but_not_in_circles(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_classes(tmp_path / "data", {"a": 1, "b": 1})
    make_classes(tmp_path / "elsewhere", {"more": 2})
    (tmp_path / "data/a/loop").symlink_to(tmp_path / "data/a")
    (tmp_path / "data/a/more").symlink_to(tmp_path / "elsewhere/more")
    (tmp_path / "data/b/gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "data/b/self.jpg").symlink_to(tmp_path / "data/b/self.jpg")
    dataset = load_folder(tmp_path / "data", test_fraction=0)
    assert [item.path for item in dataset.train] == ["a/0.png", "a/more/0.png", "a/more/1.png", "b/0.png"]
    assert "links back" in caplog.text
    (tmp_path / "data/self").symlink_to(tmp_path / "data")
    with pytest.raises(DataError, match="self"):
        load_folder(tmp_path / "data")
    assert load_folder(tmp_path / "data", drop_empty=True).class_names == ("a", "b")
    make_classes(tmp_path / "parts/train", {"a": 1, "b": 1})
    make_classes(tmp_path / "parts/test", {"a": 1, "b": 1})
    (tmp_path / "parts/train/a/up").symlink_to(tmp_path / "parts")
    assert len(load_folder(tmp_path / "parts").train) == 2


@pytest.mark.parametrize(
    ("class_names", "message"),
    [
        ({"a": "b"}, "gives 'a' and 'b' the same words, 'b'; put their images into one folder"),
        ({"a": "Tree_frog", "b": "tree  frog"}, "gives 'a' and 'b' the same words, 'Tree_frog'"),
        ({"a": "half \ud83d"}, "holds half a character"),
    ],
)
def test_words_that_no_class_list_can_hold(class_names: dict[str, str], message: str, tmp_path: Path) -> None:
    make_classes(tmp_path, {"a": 3, "b": 3, "c": 3})
    with pytest.raises(DataError, match=message):
        load_folder(tmp_path, class_names=class_names)


def test_names_agree_between_unicode_forms(tmp_path: Path) -> None:
    name = "caf\u00e9"
    for form in ("NFC", "NFD"):
        make_classes(tmp_path / form, {unicodedata.normalize(form, name): 6, "cafz": 6})
    composed, decomposed = (load_folder(tmp_path / form) for form in ("NFC", "NFD"))
    assert composed.class_names == decomposed.class_names == ("cafz", name)
    assert [item.label for item in composed.test] == [item.label for item in decomposed.test]
    assert [Path(item.path).name for item in composed.test] == [Path(item.path).name for item in decomposed.test]
    assert all(decomposed.file(item).is_file() for item in decomposed.train)
    renamed = load_folder(tmp_path / "NFD", class_names={unicodedata.normalize("NFD", name): "a coffee house"})
    assert renamed.class_names == ("cafz", "a coffee house")
    renamed = load_folder(tmp_path / "NFD", class_names={name: unicodedata.normalize("NFD", "a café")})
    assert renamed.class_names == ("cafz", "a café")
    if len(os.listdir(make_classes(tmp_path / "NFC", {unicodedata.normalize("NFD", name): 1}))) == 3:
        with pytest.raises(DataError, match="same name in another Unicode form"):
            load_folder(tmp_path / "NFC")


def test_published_twins_are_renamed_together() -> None:
    items = tuple(Item(f"{label}.jpg", label, name) for label, name in enumerate(("missile", "cat", "missile")))
    twins = Dataset(name="twins", root=Path(), class_names=("missile", "cat", "missile"), train=items, val=(), test=())
    assert rename_classes(twins, {"missile": "rocket"}).class_names == ("rocket", "cat", "rocket")
    with pytest.raises(DataError, match="the same words, 'cat'"):
        rename_classes(twins, {"missile": "cat"})


def test_class_names_map_folders(tmp_path: Path) -> None:
    make_classes(tmp_path, {"n01": 2, "n02": 2})
    dataset = load_folder(tmp_path, class_names={"n02": "goldfish"})
    assert dataset.class_names == ("n01", "goldfish")
    assert {item.class_name for item in dataset.train if item.label == 1} == {"goldfish"}
    with pytest.raises(DataError, match=r"class 0 is named .*without a word"):
        load_folder(tmp_path, class_names={"n01": ""})


def test_folders_that_are_no_data_set_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such folder"):
        load_folder(tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds no class folders"):
        load_folder(tmp_path)
    make_classes(tmp_path, {"only": 3})
    with pytest.raises(DataError, match="only one class, 'only',"):
        load_folder(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/notes.txt").write_text("none")
    with pytest.raises(DataError, match="no usable images in class 'empty'"):
        load_folder(tmp_path)


@pytest.mark.parametrize(("val", "test"), [(-0.1, 0.2), (0.0, -1.0), (0.5, 0.5), (float("nan"), 0.1)])
def test_impossible_fractions_are_refused(tmp_path: Path, val: float, test: float) -> None:
    with pytest.raises(ConfigError, match="must sum to less than 1"):
        load_folder(tmp_path, val_fraction=val, test_fraction=test)


def test_real_folders(real_data: Callable[..., Path]) -> None:
    data_root = real_data("pets", "pacs")
    pets = load_dataset(str(data_root / "pets"), None)
    assert pets.num_classes == 37
    assert len(pets.train) + len(pets.test) == 370
    assert load_dataset(str(data_root / "pacs/sketch"), None).num_classes == 7


def test_unusual_names_of_splits_are_said(tmp_path: Path) -> None:
    for split in ("seg_train/seg_train", "seg_test/seg_test"):
        for name in ("sea", "street"):
            folder = tmp_path / "intel" / split / name
            folder.mkdir(parents=True)
            Image.new("RGB", (8, 8), (len(split), len(name), 0)).save(folder / "1.png")
    findings: list[Finding] = []
    assert load_folder(tmp_path / "intel", on_finding=findings.append).class_names == ("sea", "street")
    (finding,) = findings
    assert finding.text == (
        "divided by folders: seg_test/seg_test as test, seg_train/seg_train as train; the classes are sea, street"
    )


@pytest.mark.parametrize(
    "name", ["@eaDir", "@tmp", "#recycle", "@Recycle", "@__thumb", "$RECYCLE.BIN", "System Volume Information"]
)
def test_folders_of_network_drives_are_no_classes(name: str, tmp_path: Path) -> None:
    make_classes(tmp_path, {"a": 3, "b": 3, name: 3, "lost+found": 3, f"a/{name}": 2})
    dataset, findings = open_source(str(tmp_path))
    assert dataset.class_names == ("a", "b")
    assert len(dataset.train + dataset.test) == 6
    (finding,) = findings
    assert finding.kind == "system files"
    assert set(finding.items) == {name, "lost+found", f"a/{name}"}
    assert len(list(find_images([str(tmp_path)], recursive=True))) == 6
