"""All fifteen published data sets, from folders in their exact layout."""

import random
import re
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import layouts
import pytest
from data_helpers import save_image

from maple.config import RunSettings
from maple.data import CATALOGUE, load_dataset, sample_few_shot, select_dataset
from maple.data.catalogue import DATASET_GROUPS
from maple.errors import DataError
from maple.report.groups import IMAGENET_VARIANTS
from maple.report.published import ELEVEN
from maple.runs.spec import sample


def test_the_catalogue_holds_the_fifteen() -> None:
    assert sorted(CATALOGUE) == sorted(layouts.ALL)
    assert len(CATALOGUE) == 15


def test_the_lists_of_the_papers() -> None:
    assert set(DATASET_GROUPS["paper11"]) == ELEVEN == {"imagenet", *DATASET_GROUPS["cross10"]}
    assert set(DATASET_GROUPS["imagenet-variants"]) == IMAGENET_VARIANTS
    assert len(DATASET_GROUPS["paper11"]) == 11


@pytest.mark.parametrize("name", layouts.SPLIT_LAYOUTS)
def test_split_file_layouts(name: str, tmp_path: Path) -> None:
    dataset = load_dataset(name, layouts.make(name, tmp_path))
    _, classes, _ = layouts.SPLIT_LAYOUTS[name]
    count = len(classes)
    assert dataset.class_names == tuple(classes)
    assert dataset.counts() == {"train": 3 * count, "val": count, "test": 2 * count, "classes": count}
    assert all(dataset.file(item).is_file() for item in dataset.train + dataset.val + dataset.test)
    assert not dataset.drawn_split


def test_aircraft_layout(tmp_path: Path) -> None:
    dataset = load_dataset("fgvc_aircraft", layouts.make("fgvc_aircraft", tmp_path))
    assert dataset.class_names == tuple(layouts.VARIANTS)
    assert dataset.counts() == {"train": 12, "val": 4, "test": 8, "classes": 4}
    assert [(item.path, item.class_name) for item in dataset.test if item.label == 2] == [
        ("1000042.jpg", "F/A-18"),
        ("1000052.jpg", "F/A-18"),
    ]
    assert all(dataset.file(item).is_file() for item in dataset.train + dataset.val + dataset.test)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("images_variant_val.txt", "1000000 A380\n", r"images_variant_val.txt: line 1 is '1000000 A380'; it must be"),
        ("images_variant_test.txt", "\n1000000\n", r"line 2 is '1000000'"),
        ("images_variant_test.txt", None, r"images_variant_test.txt: the file is missing"),
        ("variants.txt", None, r"variants.txt: the file is missing"),
        ("variants.txt", "A\nB\nA\n", r"variants.txt: line 3 repeats the variant 'A'"),
        ("variants.txt", b"\xff\xfe", r"variants.txt: cannot be read as text"),
    ],
)
def test_malformed_aircraft_lists_are_refused(
    file: str, text: str | bytes | None, message: str, tmp_path: Path
) -> None:
    path = layouts.make("fgvc_aircraft", tmp_path) / "fgvc_aircraft" / file
    path.unlink()
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=message):
        load_dataset("fgvc_aircraft", tmp_path)


def test_imagenet_layout(tmp_path: Path) -> None:
    dataset = load_dataset("imagenet", layouts.make("imagenet", tmp_path))
    assert dataset.class_names == ("tench", "goldfish", "crane", "crane")
    assert dataset.counts() == {"train": 48, "val": 0, "test": 8, "classes": 4}
    assert dataset.file(dataset.test[0]) == tmp_path / "imagenet/images/val/n01440764/n01440764_0.JPEG"
    base, novel = select_dataset(dataset, "base"), select_dataset(dataset, "novel")
    assert (base.class_names, novel.class_names) == (("tench", "goldfish"), ("crane", "crane"))


@pytest.mark.parametrize("shots", [1, 4, 16])
def test_imagenet_is_sampled_in_the_sorted_order(shots: int, tmp_path: Path) -> None:
    """As by the protocol's words: one generator, classes in order of appearance, sorted names."""
    dataset = load_dataset("imagenet", layouts.make("imagenet", tmp_path))
    train, val = sample_few_shot(dataset.train, dataset.val, shots, 2)
    rng = random.Random(2)
    expected = []
    for synset in sorted(layouts.SYNSETS):
        names = sorted(f"{synset}_{number}.JPEG" for number in range(12))
        assert names[2] == f"{synset}_10.JPEG", "by name, not by number"
        expected += [f"train/{synset}/{name}" for name in (rng.sample(names, shots) if shots <= 12 else names)]
    assert [item.path for item in train] == expected
    assert val == []


@pytest.mark.parametrize(("shots", "expected"), [(2, 2), (8, 4), (10, 2), (None, 0)])
def test_imagenet_has_validation_images_where_a_method_selects_on_them(
    shots: int | None, expected: int, tmp_path: Path
) -> None:
    """It has no validation split: they are drawn from the 12 training images of a class that the sample leaves over."""
    dataset = load_dataset("imagenet", layouts.make("imagenet", tmp_path))
    data: dict[str, Any] = {"dataset": "imagenet", "shots": shots, "validation": "all"}
    train, val, _ = sample(RunSettings(method={"name": "tip_adapter"}, data=data, seed=2), dataset)
    assert Counter(item.label for item in val) == dict.fromkeys(range(4), expected) if expected else not val
    assert not {item.path for item in train} & {item.path for item in val}
    others = RunSettings(method={"name": "coop"}, data=data, seed=2)
    assert sample(others, dataset)[:2] == (train, []), "the training images are the same"


@pytest.mark.parametrize("name", layouts.SYNSET_LAYOUTS)
def test_variants_have_their_own_classes_and_a_test_part_only(name: str, tmp_path: Path) -> None:
    dataset = load_dataset(name, layouts.make(name, tmp_path))
    assert dataset.class_names == ("goldfish", "crane", "crane"), "those that have a folder"
    assert dataset.counts() == {"train": 0, "val": 0, "test": 6, "classes": 3}
    assert dataset.test[0].path == "n01443537/n01443537_0.JPEG"
    assert CATALOGUE[name].evaluation_only
    with pytest.raises(DataError, match=f"'{name}' has no training images"):
        dataset.require_training()


def test_imagenetv2_is_numbered_in_the_order_of_the_names(tmp_path: Path) -> None:
    names = {f"n{10000000 + number}": f"class {number}" for number in range(12)}
    layouts.write_class_names(tmp_path / "imagenetv2", names)
    for number in range(12):
        save_image(tmp_path / layouts.V2 / str(number) / "x.jpeg")
    dataset = load_dataset("imagenetv2", tmp_path)
    assert dataset.class_names == tuple(names.values())
    assert [(item.path, item.class_name) for item in dataset.test] == [
        (f"{number}/x.jpeg", f"class {number}") for number in range(12)
    ]
    shutil.rmtree(tmp_path / layouts.V2 / "3")
    (tmp_path / layouts.V2 / "12").mkdir()
    with pytest.raises(DataError, match=r"must hold the folders 0 to 11, .*; missing: 3; not known: 12"):
        load_dataset("imagenetv2", tmp_path)


def _remove(path: str) -> Callable[[Path], object]:
    return lambda root: shutil.rmtree(root / path) if (root / path).is_dir() else (root / path).unlink()


def _write(path: str, text: str) -> Callable[[Path], object]:
    return lambda root: (root / path).write_text(text)


def _folder(path: str) -> Callable[[Path], object]:
    return lambda root: (root / path).mkdir()


def _flat_val(root: Path) -> None:
    val = root / "imagenet/images/val"
    shutil.rmtree(val)
    save_image(val / "ILSVRC2012_val_00000001.JPEG")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_remove("imagenet/classnames.txt"), r"classnames.txt: the file of class names is missing\. .*DATASETS.md"),
        (_write("imagenet/classnames.txt", ""), "classnames.txt: is empty; each line must be a synset, a space"),
        (_write("imagenet/classnames.txt", "n01440764\n"), "line 1 is 'n01440764'; each line must be"),
        (_write("imagenet/classnames.txt", "n01440764 a\ntench b\n"), "line 2 is 'tench b'; each line must be"),
        (_write("imagenet/classnames.txt", "n01440764 a\nn01440764 b\n"), "line 2 repeats synset n01440764"),
        (_write("imagenet/classnames.txt", "n01440764 a\n"), r"has no name for n01443537 n02012849 n03126707 \(3 fol"),
        (_remove("imagenet/images/val"), "images/val: the folder is missing"),
        (_remove("imagenet/images/train"), "images/train: the folder is missing"),
        (_flat_val, "images/val: holds no folders; put its images into one folder per synset"),
        (_remove("imagenet/images/val/n02012849"), r"images/val lacks n02012849: .* \(4 and 3 found\)"),
        (_remove("imagenet/images/train/n02012849"), r"images/train lacks n02012849: .* \(3 and 4 found\)"),
        (_folder("imagenet/images/train/junk"), "has no name for junk"),
        (_remove("imagenet/images/train/n02012849/n02012849_0.JPEG"), ""),
    ],
)
def test_an_incomplete_imagenet_says_what_is_wrong(
    change: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    change(layouts.make("imagenet", tmp_path))
    if not message:
        assert len(load_dataset("imagenet", tmp_path).train) == 47
        return
    with pytest.raises(DataError, match=message):
        load_dataset("imagenet", tmp_path)


def test_a_synset_without_images_is_named_and_other_files_are_skipped(tmp_path: Path) -> None:
    folder = layouts.make("imagenet", tmp_path) / "imagenet/images/train/n01440764"
    (folder / "notes.txt").write_text("not an image")
    (folder / ".hidden.jpg").write_text("not an image")
    assert len(load_dataset("imagenet", tmp_path).train) == 48
    for image in folder.glob("*.JPEG"):
        image.unlink()
    with pytest.raises(DataError, match=re.escape(f"{folder}: holds no images")):
        load_dataset("imagenet", tmp_path)


@pytest.mark.parametrize(
    ("name", "place"), [("imagenet", "imagenet/images/train"), ("imagenet_a", "imagenet-adversarial/imagenet-a")]
)
def test_what_a_system_leaves_behind_is_no_synset(name: str, place: str, tmp_path: Path) -> None:
    root = layouts.make(name, tmp_path)
    before = load_dataset(name, root)
    for unexpected_files in ("__MACOSX", ".ipynb_checkpoints"):
        (root / place / unexpected_files).mkdir()
    (root / place / "Thumbs.db").write_bytes(b"x")
    assert load_dataset(name, root) == before


def test_linked_folders_are_followed(tmp_path: Path) -> None:
    """CoOp's instructions suggest links to an ImageNet in another place."""
    layouts.make("imagenet", tmp_path / "elsewhere")
    layouts.write_class_names(tmp_path / "imagenet")
    (tmp_path / "imagenet/images").mkdir()
    for part in ("train", "val"):
        (tmp_path / "imagenet/images" / part).symlink_to(tmp_path / "elsewhere/imagenet/images" / part)
    linked, direct = load_dataset("imagenet", tmp_path), load_dataset("imagenet", tmp_path / "elsewhere")
    assert replace(linked, root=direct.root) == direct
