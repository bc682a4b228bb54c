"""Inspection of a user's own images: findings, and what is left out."""

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from maple.data import Dataset, Inspection, inspect_dataset, load_dataset, load_folder, open_source
from maple.data.checks.findings import suspicious_names
from maple.data.checks.near_duplicates import ImageHash, are_near_duplicates, image_hash, near_duplicate_groups
from maple.data.checks.open_source import check_source
from maple.data.saved_split import read_saved_split, saved_split_hash, write_saved_split
from maple.errors import DataError

Draw = Callable[..., Path]


@pytest.fixture
def draw(tmp_path: Path) -> Draw:
    """Write an image that differs from all others."""
    generator = np.random.default_rng(0)

    def made(name: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 255, (6, 6, 3)).astype(np.uint8)
        Image.fromarray(pixels).resize((48, 40), Image.Resampling.BICUBIC).save(path)
        return path

    return made


def looked_at(folder: Path, seed: int = 1, **options: Any) -> Inspection:
    dataset, remarks = open_source(str(folder), seed=seed)
    return inspect_dataset(dataset, remarks=remarks, **options)


def kinds(found: Inspection) -> dict[str, Any]:
    return {finding.kind: finding for finding in found.findings}


def paths(dataset: Dataset, *parts: str) -> set[str]:
    return {item.path for part in parts for item in getattr(dataset, part)}


def test_a_clean_folder_is_left_as_it_is(draw: Draw, tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        for number in range(8):
            draw(f"pets/{name}/{number}.png")
    seen: list[tuple[int, int]] = []
    found = looked_at(tmp_path / "pets", on_images=lambda done, total: seen.append((done, total)))
    assert found.findings == ()
    assert found.dataset == load_folder(tmp_path / "pets", seed=1)
    assert found.lines() == [
        "pets: 16 images of 2 classes (8 each): 12 to learn from, 4 to test on (drawn by the seed)"
    ]
    assert seen == [(16, 16)]


def test_broken_empty_and_stray_files(draw: Draw, tmp_path: Path) -> None:
    for name in ("cat", "dog", "owl"):
        for number in range(4):
            draw(f"pets/{name}/{number}.png")
    root = tmp_path / "pets"
    (root / "cat/0.png").write_bytes(b"no image")
    (root / "cat/9.jpg").touch()
    whole = (root / "dog/1.png").read_bytes()
    (root / "dog/1.png").write_bytes(whole[: len(whole) // 2])
    for folder in ("fish", "__MACOSX/cat", ".ipynb_checkpoints"):
        (root / folder).mkdir(parents=True)
    for file in ("cat/Thumbs.db", "cat/.DS_Store", "dog/notes.txt"):
        (root / file).write_text("x")
    draw("pets/stray.png")
    found = looked_at(root)
    by_kind = kinds(found)
    assert {path for path, _ in by_kind["unreadable"].items} == {"cat/0.png", "cat/9.jpg", "dog/1.png"}
    assert "3 files cannot be read and are left out" in by_kind["unreadable"].text
    assert by_kind["empty classes"].items == ("fish",)
    assert set(by_kind["system files"].items) == {"__MACOSX", ".ipynb_checkpoints", "cat/Thumbs.db", "cat/.DS_Store"}
    assert by_kind["stray images"].items == ("stray.png",)
    assert by_kind["other files"].items == ("dog/notes.txt",)
    assert found.dataset.class_names == ("cat", "dog", "owl")
    assert len(paths(found.dataset, "train", "test")) == 10
    assert all(row[1] and row[3] for row in found.classes())
    assert found.as_json()["classes"][0]["name"] == "cat"


@pytest.mark.parametrize("seed", range(4))
def test_duplicates_stay_in_one_split_of_a_drawn_division(draw: Draw, tmp_path: Path, seed: int) -> None:
    for name in ("cat", "dog"):
        for number in range(8):
            draw(f"pets/{name}/{number}.png")
    root = tmp_path / "pets"
    shutil.copy(root / "cat/0.png", root / "cat/copy.png")
    shutil.copy(root / "cat/1.png", root / "dog/cat1.png")
    for number in (2, 3, 4):
        small = Image.open(root / f"dog/{number}.png").convert("RGB").resize((33, 29))
        small.save(root / f"dog/small{number}.jpg", quality=60)
    found = looked_at(root, seed=seed)
    by_kind = kinds(found)
    train, test = paths(found.dataset, "train"), paths(found.dataset, "test")
    assert by_kind["copies"].items in ((("cat/0.png", "cat/copy.png"),), (("cat/copy.png", "cat/0.png"),))
    assert len({"cat/0.png", "cat/copy.png"} & (train | test)) == 1
    assert by_kind["conflicts"].items in ((("cat/1.png", "dog/cat1.png"),), (("dog/cat1.png", "cat/1.png"),))
    assert not {"cat/1.png", "dog/cat1.png"} & (train | test)
    assert {frozenset(group) for group in by_kind["near copies"].items} == {
        frozenset({f"dog/{number}.png", f"dog/small{number}.jpg"}) for number in (2, 3, 4)
    }
    for number in (2, 3, 4):
        pair = {f"dog/{number}.png", f"dog/small{number}.jpg"}
        assert pair <= train or pair <= test
    assert {Path(path).parts[0] for path in test} == {"cat", "dog"}
    # Later divisions know the groups, also after the split was saved.
    together = {frozenset(group) for group in found.dataset.near_copies}
    assert together == {frozenset(group) for group in by_kind["near copies"].items if set(group) <= train}
    write_saved_split(tmp_path / "images.json", found.dataset, "pets")
    assert read_saved_split(tmp_path / "images.json").near_copies == found.dataset.near_copies
    content = json.loads((tmp_path / "images.json").read_text())
    content.pop("near_copies", None)  # as earlier versions wrote it
    (tmp_path / "images.json").write_text(json.dumps(content))
    assert read_saved_split(tmp_path / "images.json") == replace(found.dataset, near_copies=())
    (tmp_path / "images.json").write_text(json.dumps({**content, "near_copies": [[1]]}))
    with pytest.raises(DataError, match="is damaged"):
        read_saved_split(tmp_path / "images.json")


def test_a_given_division_loses_what_leaks(draw: Draw, tmp_path: Path) -> None:
    for part in ("train", "val", "test"):
        for name in ("cat", "dog"):
            for number in range(3):
                draw(f"pets/{part}/{name}/{number}.png")
    root = tmp_path / "pets"
    shutil.copy(root / "train/cat/0.png", root / "test/cat/leak.png")
    shutil.copy(root / "val/cat/0.png", root / "test/cat/seen.png")
    Image.open(root / "train/dog/1.png").save(root / "test/dog/again.jpg", quality=60)
    found = looked_at(root)
    assert paths(found.dataset, "test") == {
        f"test/{name}/{number}.png" for name in ("cat", "dog") for number in range(3)
    }
    assert (len(found.dataset.train), len(found.dataset.val)) == (6, 6)
    assert "2 images were in several of your splits" in kinds(found)["copies"].text
    assert "1 of them would have tested what was trained on, and is left out" in kinds(found)["near copies"].text
    assert found.lines()[0].endswith("(as divided by you)")


def _of_a_fixed_camera(root: Path, *, test: int, others: int = 0) -> None:
    """Frames of one scene, in two classes, divided; and `others` images of each class that are no such frames."""
    generator = np.random.default_rng(0)
    scene = generator.integers(0, 255, (12, 12, 3)).astype(np.uint8)
    scene = np.asarray(Image.fromarray(scene).resize((96, 96), Image.Resampling.BICUBIC)).astype(int)
    for name in ("good", "bad"):
        for number in range(8):
            part = root / ("test" if number < test else "train") / name
            part.mkdir(parents=True, exist_ok=True)
            frame = (scene + generator.integers(-8, 8, scene.shape)).clip(0, 255).astype(np.uint8)
            Image.fromarray(frame).save(part / f"{number}.png")
        for number in range(others):
            for split in ("train", "test"):
                other = Image.fromarray(generator.integers(0, 255, (6, 6, 3)).astype(np.uint8))
                other.resize((96, 96), Image.Resampling.BICUBIC).save(root / split / name / f"other{number}.png")


def test_images_of_a_fixed_camera_are_tested(tmp_path: Path) -> None:
    _of_a_fixed_camera(tmp_path / "parts", test=2)
    found = looked_at(tmp_path / "parts")
    assert found.dataset.counts() == {"train": 12, "val": 0, "test": 4, "classes": 2}
    finding = kinds(found)["near copies"]
    assert finding.level == "warning"
    assert "all 4 test images look like training images" in finding.text
    assert "The division is kept" in finding.text
    assert "the same holds for the choice of a method and for the temperature" in finding.text
    assert found.dataset.near_copies == (), "they are divided later, as they are in the test"
    assert "untested classes" not in kinds(found)
    (tmp_path / "drawn").mkdir()
    for name in ("good", "bad"):
        shutil.copytree(tmp_path / "parts/train" / name, tmp_path / "drawn" / name)
    drawn = looked_at(tmp_path / "drawn")
    assert drawn.dataset.counts() == {"train": 8, "val": 0, "test": 4, "classes": 2}
    assert drawn.dataset == load_folder(tmp_path / "drawn", seed=1)
    assert "all 4 test images look like training images" in kinds(drawn)["near copies"].text


def test_near_copies_are_kept_on_request(tmp_path: Path) -> None:
    _of_a_fixed_camera(tmp_path / "parts", test=1, others=9)
    found = looked_at(tmp_path / "parts")
    assert len(found.dataset.test) == 18
    assert (
        "2 of them would have tested what was trained on, and are left out of the test"
        in kinds(found)["near copies"].text
    )
    assert "--keep-near-copies" in kinds(found)["near copies"].text
    kept = looked_at(tmp_path / "parts", keep_near_copies=True)
    assert len(kept.dataset.test) == 20
    assert "2 of 20 test images look like training images, and are kept" in kinds(kept)["near copies"].text
    assert "the same holds for the choice of a method" in kinds(kept)["near copies"].text
    assert (len(found.dataset.near_copies), kept.dataset.near_copies) == (1, ())


def test_small_drawings_are_not_copies_of_each_other() -> None:
    digits = [
        Image.fromarray((digit * 255 / 16).astype(np.uint8)).convert("RGB").resize((32, 32), Image.Resampling.BICUBIC)
        for digit in load_digits().images[:600]
    ]
    assert len(near_duplicate_groups([image_hash(digit) for digit in digits])) <= 1, "was 57 groups"
    copies = [
        image_hash(digit.resize(size)) for digit, size in zip(digits[:20], [(28, 28), (48, 48)] * 10, strict=True)
    ]
    groups = near_duplicate_groups([image_hash(digit) for digit in digits] + copies)
    assert set(groups) >= {(index, 600 + index) for index in range(20)}


def test_large_groups_are_found_in_linear_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A group of n frames takes about n comparisons, and has the members that all pairs would give."""
    generator = np.random.default_rng(0)
    scene = generator.integers(0, 255, (16, 16, 3))
    hashes = [
        ImageHash(
            bytes(8), (scene + generator.integers(-6, 6, scene.shape)).clip(0, 255).astype(np.uint8).tobytes(), False
        )
        for _ in range(3000)
    ]
    compared = []
    norm = np.linalg.norm
    monkeypatch.setattr(
        np.linalg, "norm", lambda values, **options: compared.append(len(values)) or norm(values, **options)
    )
    assert near_duplicate_groups(hashes) == [tuple(range(3000))]
    assert sum(compared) < 20_000


@pytest.mark.parametrize("extension", ["png", "tif"])
@pytest.mark.parametrize(("bits", "most"), [(10, 4), (12, 16), (14, 64)])
def test_values_of_a_sensor_in_sixteen_bits_are_reported_by_class(
    tmp_path: Path, extension: str, bits: int, most: int
) -> None:
    generator = np.random.default_rng(0)
    for name, factor in (("dim", 1), ("bright", 2 ** (16 - bits))):
        (tmp_path / "parts" / name).mkdir(parents=True)
        for number in range(4):
            values = generator.integers(0, 2**bits, (64, 64)).astype(np.uint16)
            values[0, 0] = 2**bits - 1
            Image.fromarray(values * np.uint16(factor)).save(tmp_path / f"parts/{name}/{number}.{extension}")
    finding = kinds(looked_at(tmp_path / "parts"))["dark images"]
    assert set(finding.items) == {f"dim/{number}.{extension}" for number in range(4)}
    assert finding.text.startswith(
        f"4 images with 16 bits for each colour are seen nearly black, 0 to {most} of 255: {bits}-bit"
    )
    assert f"Multiply them by {2 ** (16 - bits)}" in finding.text


def test_masks_and_previews_are_reported(draw: Draw, tmp_path: Path) -> None:
    for name in ("a", "b"):
        for number in range(4):
            image = Image.open(draw(f"pets/{name}/{number}.png"))
            image.save(tmp_path / f"pets/{name}/{number}.nef", format="TIFF")
            (tmp_path / f"pets/{name}/{number}.png").unlink()
    (tmp_path / "pets/mask").mkdir()
    for number in range(3):
        Image.fromarray(np.arange(number, number + 9, dtype=np.uint8).reshape(3, 3)).save(
            tmp_path / f"pets/mask/{number}.png"
        )
    found = kinds(looked_at(tmp_path / "pets"))
    assert "3 images are seen nearly black, 0 to 10 of 255: are these labels or masks" in found["dark images"].text
    assert found["previews"].text.startswith("8 camera RAW files are read as a preview of at most 48 x 40 pixels")


def test_images_of_other_formats_are_reported(draw: Draw, tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        for number in range(4):
            draw(f"pets/{name}/{number}.png")
    root = tmp_path / "pets"
    Image.open(root / "cat/0.png").save(root / "cat/icon.ico")
    (root / "dog/IMG_1.HEIC").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    (root / "dog/5.jpg.dvc").write_text("outs:\n- md5: 00\n  path: 5.jpg\n")
    found = looked_at(root)
    texts = " ".join(finding.text for finding in found.findings if finding.kind == "unread images")
    for text in (
        "1 ICO file cannot be read here",
        "1 HEIC file cannot be read here",
        "1 DVC pointer file",
        "`dvc pull`",
    ):
        assert text in texts
    assert found.images == 8
    assert load_folder(root).counts()["train"] == 6


def test_single_images_train_and_are_not_tested(draw: Draw, tmp_path: Path) -> None:
    draw("pets/cat/only.png")
    for number in range(3):
        draw(f"pets/dog/{number}.png")
    found = looked_at(tmp_path / "pets")
    assert found.classes() == [("cat", 1, 0, 0), ("dog", 2, 0, 1)]
    assert kinds(found)["untested classes"].items == ("cat",)
    assert kinds(found)["small classes"].items == ("dog",)


def test_a_class_whose_training_images_are_broken_gets_one_back(draw: Draw, tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        for number in range(4):
            draw(f"pets/{name}/{number}.png")
    before = load_folder(tmp_path / "pets", seed=1)
    for item in before.train:
        if item.class_name == "cat":
            before.file(item).write_bytes(b"broken")
    found = looked_at(tmp_path / "pets")
    assert found.classes()[0] == ("cat", 1, 0, 0)


def test_too_little_is_left(draw: Draw, tmp_path: Path) -> None:
    for number in range(3):
        draw(f"pets/cat/{number}.png")
        (tmp_path / "pets/dog").mkdir(exist_ok=True)
        (tmp_path / f"pets/dog/{number}.png").write_bytes(b"x")
    with pytest.raises(DataError, match=r"of 2 classes only 1 \(cat\) can be trained on.*; 3 files cannot be read"):
        looked_at(tmp_path / "pets")


def test_a_table_that_trains_on_nothing_says_why(draw: Draw, tmp_path: Path) -> None:
    rows = []
    for number in range(4):
        draw(f"{number}.png")
        rows.append(f"{number}.png,{('cat', 'dog')[number % 2]},test\n")
    (tmp_path / "table.csv").write_text("path,label,split\n" + "".join(rows))
    with pytest.raises(DataError, match=r"only 0 \(none\) can be trained on.*; 4 images are for test, as the data set"):
        looked_at(tmp_path / "table.csv")


def test_a_domain_keeps_the_classes_that_it_lacks(draw: Draw, tmp_path: Path) -> None:
    for domain, names in (("photo", ("cat", "dog", "owl")), ("sketch", ("cat", "dog"))):
        for name in names:
            for number in range(4):
                draw(f"art/{domain}/{name}/{number}.png")
    dataset, remarks = open_source(f"{tmp_path / 'art'}:sketch", seed=1)
    found = inspect_dataset(dataset, remarks=remarks, keep_classes=True)
    assert found.dataset.class_names == ("cat", "dog", "owl")
    assert kinds(found)["lacking classes"].items == ("owl",)
    assert "(owl) can still be predicted, but is not trained on" in kinds(found)["lacking classes"].text


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "no data set is given"),
        ("nosuch", "there is no such folder or file"),
        ("x" * 300, "cannot be reached"),
        ("empty", "holds no folders"),
        ("flat", r"holds 1 image \(a.png\) but no class folders"),
        ("one", "holds only one class, 'cat'"),
        ("outer", r"holds one folder, 'pets', and that holds 2 folders \(cat, dog\); .* give .*outer/pets"),
        ("trained", r"holds one folder, 'train', .* give .*trained/train"),
        ("art", r"looks like a folder of domains \(photo, sketch\) .*name one of them: .*art:photo"),
        ("swapped", r"its classes are divided inside .*turn the folders around: test/cat, train/cat"),
        ("links", r"holds no folders; .*; 1 link leads nowhere \(1 in links; cat -> /mnt/cat\)"),
        ("pets.rar", "is an archive of a kind that is not read; unpack it first"),
        ("flat/a.png", "is an image; give the folder"),
        ("notes.txt", r"is a file; give a folder .* ends in \.csv"),
    ],
)
def test_common_mistakes_are_explained(
    draw: Draw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "pets.rar").write_bytes(b"Rar!")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "links").mkdir()
    (tmp_path / "links/cat").symlink_to("/mnt/cat")
    draw("flat/a.png")
    draw("one/cat/a.png")
    for name in ("cat", "dog"):
        for place in ("outer/pets", "trained/train", "art/photo", "art/sketch"):
            draw(f"{place}/{name}/a.png")
        for part in ("train", "test"):
            draw(f"swapped/{name}/{part}/a.png")
    with pytest.raises(DataError, match=message):
        check_source(source)


def test_train_and_test_are_not_domains(draw: Draw, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            draw(f"pets/{part}/{name}/a.png")
    open_source(str(tmp_path / "pets"))
    assert not caplog.records


def test_links_and_folders_inside_are_found(draw: Draw, tmp_path: Path) -> None:
    for name in ("animals/cat", "animals/dog", "vehicles/bus", "vehicles/car"):
        draw(f"tree/{name}/a.png")
        draw(f"tree/{name}/b.png")
    (tmp_path / "tree/animals/cat/c.png").symlink_to("/mnt/c.png")
    by_kind = kinds(looked_at(tmp_path / "tree"))
    assert set(by_kind) == {"broken links", "nested folders"}
    assert by_kind["broken links"].items == ("animals/cat/c.png",)
    assert {finding.level for finding in by_kind.values()} == {"warning"}


def test_suspicious_names() -> None:
    names = ("class_01", "Class 2", "12", "n0123456", "AnnualCrop", "a" * 61, "salt, pepper", "red_car", "Red Car")
    found = {finding.kind: finding.items for finding in suspicious_names(names)}
    assert found["placeholder names"] == ("class_01", "Class 2")
    assert found["names without letters"] == ("12",)
    assert found["synset names"] == ("n0123456",)
    assert found["joined names"] == ("AnnualCrop",)
    assert found["long names"] == ("a" * 61,)
    assert found["marked names"] == ("salt, pepper",)
    assert found["doubled names"] == (("red_car", "Red Car"),)
    assert "mixed spelling" in found
    assert suspicious_names(["tabby cat", "red panda", "café", "B-52 bomber".lower()]) == []
    [script] = suspicious_names(["tabby cat", "猫", "кошка"])
    assert (script.kind, script.level, script.items) == ("names in other scripts", "warning", ("猫", "кошка"))


def test_names_are_judged_after_they_were_given(draw: Draw, tmp_path: Path) -> None:
    for name in ("n02123045", "n02110341", "empty"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for number in range(4 if name != "empty" else 0):
            draw(f"pets/{name}/{number}.png")
    words = {"n02123045": "tabby cat", "n02110341": "dalmatian", "empty": "nothing"}
    dataset, remarks = open_source(str(tmp_path / "pets"), class_names=words)
    found = inspect_dataset(dataset, remarks=remarks)
    assert set(kinds(found)) == {"empty classes"}
    assert found.dataset.class_names == ("dalmatian", "tabby cat")


def test_looks(draw: Draw) -> None:
    image = Image.open(draw("a.png")).convert("RGB")
    other = Image.open(draw("b.png")).convert("RGB")
    grey = Image.new("RGB", (40, 40), (90, 90, 90))
    assert are_near_duplicates(image_hash(image), image_hash(image.resize((200, 160))))
    assert not are_near_duplicates(image_hash(image), image_hash(other))
    assert not are_near_duplicates(image_hash(grey), image_hash(grey))
    swapped = Image.merge("RGB", image.split()[::-1])
    assert not are_near_duplicates(image_hash(image), image_hash(swapped))
    looks = [image_hash(one) for one in (grey, other, image, grey, image.resize((20, 20)), image)]
    assert near_duplicate_groups(looks) == [(2, 4, 5)]
    assert near_duplicate_groups([]) == []


@pytest.mark.skipif(os.name != "posix", reason="needs bytes as file names")
def test_names_that_are_no_text(draw: Draw, tmp_path: Path) -> None:
    for number in range(3):
        draw(f"pets/dog/{number}.png")
        folder = os.fsencode(tmp_path / "pets") + b"/caf\xe9"
        os.makedirs(folder, exist_ok=True)
        shutil.copy(draw("x.png"), os.path.join(folder, b"%d.png" % number))
    found = looked_at(tmp_path / "pets")
    assert found.dataset.class_names == ("caf\udce9", "dog")
    write_saved_split(tmp_path / "images.json", found.dataset, str(tmp_path / "pets"))
    assert read_saved_split(tmp_path / "images.json").train == found.dataset.train


def test_a_listing_is_read_as_it_was_written(draw: Draw, tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        for number in range(4):
            draw(f"pets/{name}/{number}.png")
    dataset = load_folder(tmp_path / "pets", seed=3)
    path = tmp_path / "images.json"
    written = write_saved_split(path, dataset, str(tmp_path / "pets"))
    assert read_saved_split(path, written) == dataset
    assert saved_split_hash(read_saved_split(path)) == written
    text = path.read_text()
    path.write_text(text.replace('"dog/', '"dog2/', 1))
    with pytest.raises(DataError, match="is not the list of images that this run was made with"):
        read_saved_split(path, written)
    for damaged in (
        "{",
        "[]",
        "{}",
        text.replace('"format": 1', '"format": 2'),
        text.replace('"class_names"', '"names"'),
    ):
        path.write_text(damaged)
        with pytest.raises(DataError, match=r"images\.json"):
            read_saved_split(path)
    path.write_text(text)
    (tmp_path / "pets").rename(tmp_path / "moved")
    with pytest.raises(DataError, match='is gone; put it back, or write where it is now as "root"'):
        read_saved_split(path, written)
    path.write_text(text.replace(str(tmp_path / "pets") + '",\n "drawn', str(tmp_path / "moved") + '",\n "drawn'))
    assert read_saved_split(path, written).root == tmp_path / "moved"


def test_a_class_name_of_another_encoding_is_reported() -> None:
    [found] = suspicious_names(["cat", "b\udcff d"])
    assert (found.kind, found.level) == ("undecodable names", "warning")
    assert "rename the folder" in found.text


def test_files_that_cannot_be_read_here_are_counted_by_class(
    draw: Draw, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("maple.data.images.formats.is_read", lambda kind: kind in ("PNG", "JPEG"))
    for name in ("cat", "dog"):
        for number in range(4):
            draw(f"pets/{name}/{number}.png")
    root = tmp_path / "pets"
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
    (root / "owl").mkdir()
    for path in ("dog/1.HEIC", "dog/2.heic", "dog/IMG_3", "owl/4.HEIC"):
        (root / path).write_bytes(heic + bytes(100))
    (root / "dog/clip.mov").write_bytes(b"\0\0\0\x14ftypqt  \0\0\0\0qt  ")
    (root / "dog/clip").write_bytes(b"\x1aE\xdf\xa3" + bytes(50))
    (root / "dog/notes.pdf").write_bytes(b"%PDF-1.7")
    (root / "dog/scan").write_bytes(bytes(128) + b"DICM" + bytes(50))
    (root / "dog/array").write_bytes(b"\x93NUMPY\1\0" + bytes(50))
    (root / "dog/logo").write_bytes(b"<?xml version='1.0'?><svg width='4'></svg>")
    (root / "dog/labels.txt").write_text("none of these")
    text = "4 HEIC files cannot be read here (3 in dog, 1 in owl; dog/1.HEIC): convert to JPEG, or install a decoder"
    found = looked_at(root)
    unread = [finding for finding in found.findings if finding.kind == "unread images"]
    assert all(finding.level == "warning" for finding in unread)
    assert unread[0].text.startswith(text)
    assert {finding.text.partition(" cannot")[0] for finding in unread} == {
        "4 HEIC files",
        "2 video files",
        "1 PDF file",
        "1 SVG file",
        "1 DICOM file",
        "1 NumPy file",
    }
    assert any(
        "(dog/scan): convert to PNG with the window" in finding.text.replace("1 in dog; ", "") for finding in unread
    )
    assert kinds(found)["other files"].items == ("dog/labels.txt",)
    with pytest.raises(DataError, match=f"no usable images in class 'owl'.*; {re.escape(text)}"):
        load_dataset(str(root), None)
    shutil.rmtree(root / "owl")
    caplog.clear()
    assert len(load_dataset(str(root), None, test_fraction=0).train) == 8
    assert "3 HEIC files cannot be read here (3 in dog; dog/1.HEIC)" in caplog.text
