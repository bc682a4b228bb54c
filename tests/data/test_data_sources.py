"""Parquet, Arrow, archives, shards and data sets of the hub, read as data sets: well-formed and broken ones."""

import errno
import io
import json
import multiprocessing
import os
import re
import signal
import socket
import tarfile
import unicodedata
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_helpers import UnflaggedInfo
from PIL import Image
from typer.testing import CliRunner

from maple.cli import app
from maple.data import load_dataset, open_source, read_image
from maple.data.catalogue import canonical_name, place_of_absent
from maple.data.checks.inspection import inspect_dataset
from maple.data.saved_split import read_saved_split, write_saved_split
from maple.data.sources import shards, unpacked
from maple.errors import ConfigError, DataError, ImageError
from maple.inference.sources.image_sources import find_images

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

NAMES = ("cat", "dog", "Käse")


def encoded(number: int, kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(number).integers(0, 60, (24, 24, 3)).astype(np.uint8)
    pixels[..., number % 3] += 150
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, kind)
    return content.getvalue()


IMAGES = [encoded(number) for number in range(12)]
LABELS = [NAMES[number % 3] for number in range(12)]


def table(path: Path, columns: Mapping[str, Any] | None = None, **more: Any) -> str:
    parquet.write_table(pa.table({**(columns or {"image": IMAGES, "label": LABELS}), **more}), path)
    return str(path)


def shard(path: Path, members: Sequence[tuple[str, bytes]]) -> str:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return str(path)


def samples(labels: Sequence[object] = LABELS, extension: str = "cls") -> list[tuple[str, bytes]]:
    pairs = zip(IMAGES, labels, strict=True)
    return [
        member
        for number, (image, label) in enumerate(pairs)
        for member in ((f"{number:03d}.png", image), (f"{number:03d}.{extension}", str(label).encode()))
    ]


def zipped(path: Path, members: Mapping[str, bytes]) -> str:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return str(path)


def class_members(prefix: str = "") -> dict[str, bytes]:
    return {f"{prefix}{label}/{number}.png": IMAGES[number] for number, label in enumerate(LABELS)}


def contents(dataset: Any) -> dict[str, set[bytes]]:
    found: dict[str, set[bytes]] = {name: set() for name in dataset.class_names}
    for item in (*dataset.train, *dataset.val, *dataset.test):
        found[item.class_name].add(dataset.file(item).read_bytes())
    return found


EXPECTED = {name: {IMAGES[number] for number in range(12) if LABELS[number] == name} for name in NAMES}


def as_parquet(folder: Path) -> str:
    return table(folder / "pets.parquet")


def as_structs(folder: Path) -> str:
    return table(
        folder / "pets.parquet", {"photo": [{"bytes": image, "path": None} for image in IMAGES], "kind": LABELS}
    )


def as_paths(folder: Path) -> str:
    (folder / "photos").mkdir()
    for number, image in enumerate(IMAGES):
        (folder / "photos" / f"{number}.png").write_bytes(image)
    paths = [f"photos\\{number}.png" for number in range(12)]
    return table(folder / "pets.parquet", {"file_name": paths, "label": LABELS, "id": list(range(12))})


def as_arrow(folder: Path) -> str:
    content = pa.table({"image": IMAGES, "label": LABELS})
    with pa.ipc.new_file(folder / "pets.arrow", content.schema) as writer:
        writer.write_table(content)
    return str(folder / "pets.arrow")


def as_zip(folder: Path) -> str:
    trash = {f"__MACOSX/pets/cat/._{number}.png": b"Mac" for number in range(3)}
    return zipped(folder / "pets.zip", {**class_members("pets/"), **trash})


def as_windows_zip(folder: Path) -> str:
    return zipped(folder / "pets.zip", {name.replace("/", "\\"): image for name, image in class_members().items()})


def as_tar(folder: Path) -> str:
    return shard(folder / "pets.tar", list(class_members().items()))


def as_shards(folder: Path) -> str:
    shard(folder / "shards" / "00.tar", samples()[:12])
    shard(folder / "shards" / "01.tar", samples()[12:])
    return str(folder / "shards" / "{00..01}.tar")


def as_shard_folder(folder: Path) -> str:
    return str(Path(as_shards(folder)).parent)


def as_json_shard(folder: Path) -> str:
    labels = [json.dumps({"label": label, "caption": f"photo {number}"}) for number, label in enumerate(LABELS)]
    return shard(folder / "pets.tar", samples(labels, "json"))


def as_zip_with_table(folder: Path) -> str:
    rows = "".join(f"photos/{number}.png,{label}\n" for number, label in enumerate(LABELS))
    images = {f"photos/{number}.png": image for number, image in enumerate(IMAGES)}
    return zipped(folder / "pets.zip", {**images, "images.csv": ("path,label\n" + rows).encode()})


SOURCES: list[Callable[[Path], str]] = [
    *(as_parquet, as_structs, as_paths, as_arrow, as_zip, as_windows_zip, as_tar),
    *(as_shards, as_shard_folder, as_json_shard, as_zip_with_table),
]


@pytest.mark.parametrize("make", SOURCES)
def test_each_kind_gives_the_same_bytes_and_classes(make: Callable[[Path], str], tmp_path: Path) -> None:
    source = make(tmp_path)
    dataset, findings = open_source(source, seed=3)
    assert contents(dataset) == EXPECTED
    assert dataset.counts() == {"train": 9, "val": 0, "test": 3, "classes": 3}
    assert dataset.drawn_split
    assert not findings
    assert place_of_absent(source, None) is None
    assert load_dataset(canonical_name(source), None, seed=3).train == dataset.train


def test_class_labels_keep_their_order_and_splits_are_used(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["z", "a", "unused"]))
    rows = {"image": [{"bytes": image, "path": None} for image in IMAGES], "label": [0, 1] * 6}
    whole = datasets.Dataset.from_dict(rows, features=features)
    unlabelled = datasets.Dataset.from_dict({"image": rows["image"][:2], "label": [-1, -1]}, features=features)
    parts = {"train": whole.select(range(8)), "validation": whole.select(range(8, 12)), "test": unlabelled}
    datasets.disable_progress_bars()
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    dataset, findings = open_source(str(tmp_path / "saved"))
    assert dataset.class_names == ("z", "a")
    assert dataset.counts() == {"train": 8, "val": 0, "test": 4, "classes": 2}  # a val without a test split is the test
    assert [finding.kind for finding in findings] == ["no label", "empty classes"]
    (tmp_path / "hub" / "data").mkdir(parents=True)
    for split, part in parts.items():
        part.to_parquet(tmp_path / "hub" / "data" / f"{split}-00000-of-00001.parquet")
    assert open_source(str(tmp_path / "hub"))[0].counts() == dataset.counts()


def test_rows_without_an_image_or_a_label_are_left_out_and_reported(tmp_path: Path) -> None:
    images = [*IMAGES[:10], None, b"not an image"]
    labels = [*LABELS[:9], None, *LABELS[10:]]
    dataset, findings = open_source(table(tmp_path / "pets.parquet", {"image": images, "label": labels}))
    assert {finding.kind for finding in findings} == {"no label", "no image"}
    assert any("pets.parquet#9" in finding.text for finding in findings)
    # Bytes that are not an image are kept for the inspection, which reports them as it does files.
    assert sum(dataset.counts()[split] for split in ("train", "test")) == 10


def test_numbers_without_names_are_reported_and_a_list_names_them(tmp_path: Path) -> None:
    source = table(tmp_path / "pets.parquet", {"image": IMAGES, "label": [float(n % 12) for n in range(11)] + [None]})
    with pytest.raises(DataError, match="all 11 images have different labels"):
        load_dataset(source, None)
    source = table(tmp_path / "pets.parquet", {"image": IMAGES, "label": [*([0.0, 10.0, 2.0] * 3), 0.0, 2.0, None]})
    dataset, findings = open_source(source)
    assert dataset.class_names == ("0", "2", "10")
    assert "classnames.txt" in findings[-1].text
    assert not any(f.kind == "numbered classes" for f in open_source(source, class_names={"0": "cat"})[1])
    (tmp_path / "classnames.txt").write_text("\n".join(f"word {number}" for number in range(11)))
    assert load_dataset(source, None).class_names == ("word 0", "word 2", "word 10")
    (tmp_path / "classnames.txt").write_text("cat\ndog\n")
    with pytest.raises(DataError, match=r"pets.parquet#1 has the label 10, but there are 2 class names"):
        load_dataset(source, None)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"left": IMAGES, "right": IMAGES, "label": LABELS}, r"images is not clear.*image_column.*left \(bytes\)"),
        ({"image": IMAGES, "fine": LABELS, "coarse": LABELS}, r"labels is not clear.*label_column.*fine \(text\)"),
        ({"image": IMAGES}, r"labels is not clear"),
        ({"image": IMAGES, "label": [0.5] * 12}, r"#0 has the label 0.5, float"),
        ({"image": IMAGES, "label": ["nan"] * 12}, r"as software writes a missing value"),
        ({"image": IMAGES, "label": [None] * 12}, r"none of its 12 images has a label"),
        ({"image": [], "label": []}, r"(holds no images|not clear)"),
        ({"path": ["http://a/b.jpg"] * 12, "label": LABELS}, r"names the address"),
    ],
)
def test_unclear_tables_are_refused(columns: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        load_dataset(table(tmp_path / "pets.parquet", columns), None)
    assert not list((Path(os.environ["MAPLE_CACHE"]) / "sources").glob("*/source.json"))


def test_one_class_is_for_evaluation_only(tmp_path: Path) -> None:
    source = table(tmp_path / "pets.parquet", {"image": IMAGES, "label": ["cat"] * 12})
    with pytest.raises(DataError, match="has only one class, 'cat'"):
        load_dataset(source, None)
    assert load_dataset(source, None, min_classes=1).class_names == ("cat",)


def test_columns_are_named(tmp_path: Path) -> None:
    source = table(tmp_path / "p.parquet", {"left": IMAGES, "right": IMAGES[::-1], "a": LABELS, "b": ["x", "y"] * 6})
    dataset = load_dataset(source, None, image_column="right", label_column="b")
    assert dataset.class_names == ("x", "y")
    with pytest.raises(DataError, match=r"unknown column 'up'; choose one of: left, right"):
        load_dataset(source, None, image_column="up")
    named = ["--set", "data.image_column=right", "--set", "data.label_column=b"]
    checked = CliRunner().invoke(app, ["fit", source, "--check", "--json", *named], catch_exceptions=False)
    assert [each["name"] for each in json.loads(checked.stdout)["classes"]] == ["x", "y"]


def test_columns_of_a_table_in_an_archive_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = "".join(f"photos/{number}.png,animal,{label}\n" for number, label in enumerate(LABELS))
    images = {f"photos/{number}.png": image for number, image in enumerate(IMAGES)}
    source = zipped(tmp_path / "pets.zip", {**images, "images.csv": ("path,label,species\n" + rows).encode()})
    assert contents(load_dataset(source, None, label_column="species")) == EXPECTED
    folders = zipped(tmp_path / "pets2.zip", class_members())
    assert contents(load_dataset(folders, None, label_column="species")) == EXPECTED
    assert "pets2.zip: is not read as a table, and has no column 'species'" in caplog.text


def test_a_column_of_a_bundled_data_set_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    load_dataset("emoji-food/lineart", None, label_column="species")
    assert "emoji-food/lineart: is not read as a table, and has no column 'species'" in caplog.text


def test_a_column_of_splits_is_used(tmp_path: Path) -> None:
    splits = ["train"] * 6 + ["valid"] * 3 + ["test"] * 3
    assert load_dataset(table(tmp_path / "p.parquet", split=splits), None).counts()["val"] == 3
    assert load_dataset(table(tmp_path / "p.parquet", Split=splits), None).counts()["val"] == 3
    datasets = pytest.importorskip("datasets")
    kinds = {"image": datasets.Value("binary"), "label": datasets.Value("string")}
    numbered = datasets.Features({**kinds, "split": datasets.ClassLabel(names=["Test", "train"])})
    rows = {"image": IMAGES, "label": LABELS, "split": [1] * 9 + [0] * 3}
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict(rows, features=numbered).to_parquet(tmp_path / "numbered.parquet")
    dataset = load_dataset(str(tmp_path / "numbered.parquet"), None)
    assert (dataset.counts()["train"], dataset.counts()["test"], dataset.drawn_split) == (9, 3, False)


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        (["tain"] * 12, "unknown split 'tain'"),
        (
            ["train"] * 6 + [None] * 3 + ["test"] * 3,
            r"#6 has no split, but .*#0 has 'train'; it must be train, val or test, in every row or in none",
        ),
        ([0] * 9 + [1] * 3, r"#0 has the split 0; it must be"),
        ([True] * 12, r"#0 has the split True; it must be"),
    ],
)
def test_other_splits_are_refused(splits: list[Any], message: str, tmp_path: Path) -> None:
    source = table(tmp_path / "p.parquet", split=splits)
    with pytest.raises(DataError, match=message):
        load_dataset(source, None)
    assert len(list(find_images([source]))) == 12, "a prediction needs none"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.parquet", b"", "is empty"),
        ("x.parquet", b"PAR1 not really", "cannot be read"),
        ("x.arrow", b"not arrow at all", "cannot be read"),
        ("x.zip", b"PK\3\4 not really", "damaged"),
        ("x.tar", b"", "empty|damaged|holds"),
        ("x.tar.gz", b"\x1f\x8b\x08 no", "damaged"),
    ],
)
def test_damaged_files_are_refused(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_dataset(str(tmp_path / name), None)


@pytest.mark.parametrize(
    "name", ["x.parquet", "x.arrow", "x.zip", "x.tar", "x.tar.gz", "x.csv", "x.jsonl", "{0..0}.tar", "parquet/"]
)
def test_pointers_say_how_to_fetch_the_file(name: str, tmp_path: Path) -> None:
    path = tmp_path / {"{0..0}.tar": "0.tar", "parquet/": "parquet/train.parquet"}.get(name, name)
    path.parent.mkdir(exist_ok=True)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    message = f"^{re.escape(str(path))}: is a git-lfs pointer; fetch the file itself with `git lfs pull`$"
    with pytest.raises(DataError, match=message):
        load_dataset(str(tmp_path / name), None)
    if path.suffix not in (".csv", ".jsonl"):
        (image,) = find_images([str(tmp_path / name)])
        with pytest.raises(DataError, match=message):
            image.read()


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"../cat/1.png": IMAGES[0]}, "leaves its folder .*it is not unpacked; make it again"),
        ({"inner.zip": b"PK", "other.tar": b"x"}, r"holds no images but archives \(inner.zip, other.tar\)"),
        ({"1.png": IMAGES[0], "2.png": IMAGES[1]}, r"holds 2 files \(1.png, 2.png\) but no class folders"),
        ({"cat/1.png": IMAGES[0]}, "only one class, 'cat'"),
        ({}, "holds nothing but no class folders|damaged"),
    ],
)
def test_other_zips_are_refused(members: dict[str, bytes], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        load_dataset(zipped(tmp_path / "pets.zip", members), None)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("1.png", IMAGES[0]), ("2.png", IMAGES[1])], "none of its 2 images has a label"),
        ([*samples(), ("999.png", IMAGES[0]), ("999.png", IMAGES[0])], "twice"),
        (samples(["{"] * 12, "json"), "is not JSON"),
        (samples([7, "cat"] * 6), "some labels are names, others numbers"),
        (samples([f"a photo of number {n}" for n in range(12)], "txt"), "all 12 images have different labels"),
        ([("1.png", IMAGES[0]), ("1.jpg", IMAGES[1]), ("1.cls", b"cat")], "has several images"),
        (
            [
                (f"img_0.{number}.{kind}", IMAGES[0] if kind == "png" else b"cat")
                for number in "12"
                for kind in ("png", "cls")
            ],
            r"keys contain dots \(img_0.1.png\): WebDataset ends a key at the first one; write img_0_1.png",
        ),
        ([("1.left.png", IMAGES[0]), ("1.right.png", IMAGES[1]), ("1.cls", b"cat")], "several images .*image_column"),
    ],
)
def test_other_shards_are_refused(members: list[tuple[str, bytes]], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        load_dataset(shard(tmp_path / "x.tar", members), None)


@pytest.mark.parametrize("encoding", ["utf-8", "cp437", "gbk"])
def test_names_of_a_zip_of_unknown_encoding_are_reported(
    encoding: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = ("chat", "\u72d7" if encoding == "gbk" else "\u00e9t\u00e9")
    with zipfile.ZipFile(tmp_path / "pets.zip", "w") as archive:
        for number, image in enumerate(IMAGES):
            archive.writestr(UnflaggedInfo(f"{words[number % 2]}/{number}.png", encoding), image)
    source = str(tmp_path / "pets.zip")
    for _ in range(2):  # unpacked, then found in the cache
        dataset, findings = open_source(source)
        assert (set(dataset.class_names) == set(words)) == (encoding != "gbk")
        assert [finding.kind for finding in findings if finding.kind == "unknown encoding"] == (
            [] if encoding == "utf-8" else ["unknown encoding"]
        )
    caplog.clear()
    names = {Path(image.name.partition("#")[2]).parent.name for image in find_images([source])}
    assert names == set(dataset.class_names)
    assert ("make the archive again with names in UTF-8" in caplog.text) == (encoding != "utf-8")


def test_a_class_list_above_the_shards_may_change(tmp_path: Path) -> None:
    for split, part in (("train", slice(0, 12)), ("test", slice(12, 24))):
        shard(tmp_path / split / "0.tar", samples([number % 3 for number in range(12)])[part])
    for names in (("cat", "dog", "eel"), ("ant", "bee", "cow")):
        (tmp_path / "classnames.txt").write_text("\n".join(names))
        assert load_dataset(str(tmp_path), None).class_names == names


def with_sidecars(extension: str, content: Callable[[int], str]) -> list[tuple[str, bytes]]:
    return [
        member
        for number in sorted(range(12), key=lambda number: LABELS[number])
        for member in (
            (f"pets/{LABELS[number]}/{number}.png", IMAGES[number]),
            (f"pets/{LABELS[number]}/{number}.{extension}", content(number).encode()),
        )
    ]


@pytest.mark.parametrize("peek", [400, 5])
@pytest.mark.parametrize(
    ("extension", "content"),
    [
        ("txt", "a photo of number {}"),
        ("json", '{{"license": "cc0", "id": {}}}'),
        ("json", '{{"label": ""}}'),
        ("json", "{{"),
    ],
)
def test_captions_next_to_the_images_of_class_folders(
    extension: str, content: str, peek: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "_PEEK", peek)
    source = shard(tmp_path / "pets.tar", with_sidecars(extension, content.format))
    dataset, findings = open_source(source)
    assert contents(dataset) == EXPECTED
    assert [finding.kind for finding in findings] == ["reading"]
    assert "its classes are its folders" in findings[0].text


def test_labels_next_to_the_images_of_folders(tmp_path: Path) -> None:
    labels = ["even", "odd"] * 6
    for name, members, key in (
        ("json", with_sidecars("json", lambda number: json.dumps({"label": labels[number]})), None),
        ("key", with_sidecars("json", lambda number: json.dumps({"parity": labels[number]})), "parity"),
        ("cls", with_sidecars("cls", lambda number: labels[number]), None),
        ("txt", with_sidecars("txt", lambda number: labels[number]), "txt"),
    ):
        dataset, findings = open_source(shard(tmp_path / f"{name}.tar", members), label_column=key)
        assert dataset.class_names == ("even", "odd")
        is_noted = name in ("json", "key")
        assert [finding.text for finding in findings] == [
            "its classes are the labels in its .json files, not its 3 folders"
        ] * is_noted


@pytest.mark.parametrize("pattern", ["{00..01}.tar", "*.tar", "0[01].tar"])
def test_shards_below_a_folder_with_brackets(pattern: str, tmp_path: Path) -> None:
    as_shards(tmp_path)
    folder = (tmp_path / "shards").rename(tmp_path / "scans [v2]")
    assert contents(load_dataset(str(folder / pattern), None)) == EXPECTED
    with pytest.raises(DataError, match=r"lacks 1 of 3 shards \(.*02.tar\)"):
        load_dataset(str(folder / "{00..02}.tar"), None)


def test_missing_shards_are_named(tmp_path: Path) -> None:
    pattern = as_shards(tmp_path).replace("01}", "02}")
    assert place_of_absent(pattern, None) == str(tmp_path / "shards" / "02.tar")
    with pytest.raises(DataError, match=r"lacks 1 of 3 shards \(.*02.tar\)"):
        load_dataset(pattern, None)


def test_a_source_is_unpacked_once_and_again_when_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = as_parquet(tmp_path)
    first = load_dataset(source, None)
    with monkeypatch.context() as patch:
        patch.setattr(unpacked, "_write", lambda *_: pytest.fail("it is unpacked twice"))
        assert load_dataset(source, None) == first
    first.file(first.train[0]).write_bytes(b"cut")  # what is incomplete is unpacked again
    assert contents(load_dataset(source, None)) == EXPECTED
    table(tmp_path / "pets.parquet", {"image": IMAGES[:6], "label": LABELS[:6]})
    assert sum(load_dataset(source, None).counts()[split] for split in ("train", "test")) == 6


def test_tables_that_an_earlier_version_has_unpacked(tmp_path: Path) -> None:
    """It did not note the files that images were copied from: tables of paths are unpacked once more."""
    folder = Path(os.environ["MAPLE_CACHE"]) / "sources"
    for source, folders in ((as_paths(tmp_path), 2), (table(tmp_path / "embedded.parquet"), 3)):
        load_dataset(source, None)
        for noted in folder.glob("*/copied.jsonl"):
            noted.unlink()
        for _ in range(2):
            assert contents(load_dataset(source, None)) == EXPECTED
            assert len(list(folder.glob("*/source.json"))) == folders


def test_the_files_of_a_table_of_paths_may_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source, photos = Path(as_paths(tmp_path)).name, tmp_path / "photos"
    (photos / "1.png").rename(tmp_path / "1.png")
    (photos / "4.png").write_bytes(IMAGES[4][:60])
    damaged, findings = open_source(source)
    inspection = inspect_dataset(damaged, remarks=findings)
    remarks = " ".join(finding.text for finding in inspection.findings)
    assert "1 of 12 rows have an image that is not there" in remarks
    assert f"pets.parquet#4 ({photos / '4.png'}): " in remarks
    broken = next(item for item in (*damaged.train, *damaged.test) if damaged.file(item).stat().st_size == 60)
    with pytest.raises(ImageError, match=rf"^pets.parquet#4 \({re.escape(str(photos / '4.png'))}\): "):
        damaged.store().get(broken.path)
    (tmp_path / "1.png").rename(photos / "1.png")
    (photos / "4.png").write_bytes(IMAGES[4])
    mended = load_dataset(str(tmp_path / source), None)
    assert contents(mended) == EXPECTED
    assert damaged.file(broken).exists()  # another process may read it
    monkeypatch.setattr(unpacked, "_write", lambda *_: pytest.fail("it is unpacked twice"))
    assert load_dataset(source, None) == mended


@pytest.mark.parametrize(("stored", "written"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_paths_of_a_table_are_found_in_either_unicode_form(stored: Any, written: Any, tmp_path: Path) -> None:
    paths = [f"Käse/é{number}.png" for number in range(12)]
    (tmp_path / unicodedata.normalize(stored, "Käse")).mkdir()
    for path, image in zip(paths, IMAGES, strict=True):
        (tmp_path / unicodedata.normalize(stored, path)).write_bytes(image)
    names = [unicodedata.normalize(written, path) for path in paths]
    source = table(tmp_path / "pets.parquet", {"path": names, "label": LABELS})
    assert contents(load_dataset(source, None)) == EXPECTED
    table(tmp_path / "pets.parquet", {"path": [f"no/{name}" for name in names], "label": LABELS})
    with pytest.raises(DataError, match=r"12 rows name images that are not there \(first: .*#0 \(.*no/.*\)\), and no"):
        load_dataset(source, None)


def test_a_file_of_a_table_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def regular(path: Path) -> Path:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    source = as_paths(tmp_path)
    monkeypatch.setattr(unpacked.files, "regular", regular)
    with pytest.raises(DataError, match=r"pets.parquet#0: its image .*0.png cannot be read \(Permission denied\)"):
        load_dataset(source, None)


def test_an_interrupted_unpacking_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(os.environ["MAPLE_CACHE"]) / "sources"
    monkeypatch.setattr(unpacked.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(DataError, match=r"only 0 MB are free.*make room there, or set MAPLE_CACHE"):
        load_dataset(as_parquet(tmp_path), None)
    assert not [path for path in folder.iterdir() if path.suffix != ".lock"]


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_processes_that_open_a_source_at_once_unpack_it_once(tmp_path: Path) -> None:
    source = as_parquet(tmp_path)
    folder = Path(os.environ["MAPLE_CACHE"]) / "sources"

    def work() -> None:
        assert contents(load_dataset(source, None)) == EXPECTED

    processes = [multiprocessing.get_context("fork").Process(target=work) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len([path for path in folder.iterdir() if path.is_dir()]) == 1


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_killed_process_leaves_nothing_that_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = as_parquet(tmp_path)
    folder = Path(os.environ["MAPLE_CACHE"]) / "sources"
    monkeypatch.setattr(unpacked._Writer, "result", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    process = multiprocessing.get_context("fork").Process(target=lambda: load_dataset(source, None))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert list(folder.glob(".maple-*.tmp/images/all/0000/*.png"))
    monkeypatch.undo()
    monkeypatch.setenv("MAPLE_CACHE", str(folder.parent))
    assert contents(load_dataset(source, None)) == EXPECTED
    assert not list(folder.glob(".maple-*"))


@pytest.mark.skipif(os.name != "posix", reason="nothing is removed without flock")
def test_clearing_removes_what_a_killed_process_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    left = Path(os.environ["MAPLE_CACHE"]) / "sources" / ".maple-0123abcd.tmp"
    (left / "images").mkdir(parents=True)
    assert unpacked.clear_sources() == (0, 0)
    assert not left.exists()
    removed = unpacked.Unpacked(left.parent / "removed", 1, 0.0, {})  # by another process, since it was listed
    monkeypatch.setattr(unpacked, "unpacked_sources", lambda **_: [removed])
    assert unpacked.clear_sources() == (0, 0)


def test_a_source_is_unpacked_where_there_are_no_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fcntl = pytest.importorskip("fcntl")

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert contents(load_dataset(as_parquet(tmp_path), None)) == EXPECTED
    assert "has no locks" in caplog.text


def test_a_run_finds_its_images_after_the_cache_is_cleared(tmp_path: Path) -> None:
    source = as_parquet(tmp_path)
    dataset = load_dataset(source, None)
    write_saved_split(tmp_path / "images.json", dataset, source)
    shown = CliRunner().invoke(app, ["cache", "list", "--json"], catch_exceptions=False).output
    assert json.loads(shown)["sources"][0]["source"] == source
    assert "which count to no limit" in CliRunner().invoke(app, ["cache", "list"], catch_exceptions=False).output
    cleared = CliRunner().invoke(app, ["cache", "clear"], catch_exceptions=False).output
    assert "unpacked sources: removed 1" in cleared
    assert not dataset.root.exists()
    again = read_saved_split(tmp_path / "images.json")
    assert read_image(again.file(again.train[0])).size == (24, 24)


def test_without_a_cache_nothing_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAPLE_CACHE", "off")
    with pytest.raises(ConfigError, match="MAPLE_CACHE is off"):
        load_dataset(as_parquet(tmp_path), None)


def test_the_hub_is_streamed_and_kept(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=list(NAMES)))
    rows = {"image": [{"bytes": image, "path": None} for image in IMAGES], "label": [0, 1, 2] * 4}
    data = datasets.Dataset.from_dict(rows, features=features)
    asked: list[tuple[Any, ...]] = []

    def load(name: str, config: str | None, *, revision: str | None, streaming: bool) -> Any:
        asked.append((name, config, revision, streaming))
        parts = {name: data.to_iterable_dataset() for name in ("train", "test", "unsupervised")}
        return datasets.IterableDatasetDict(parts)

    monkeypatch.setattr(datasets, "load_dataset", load)
    dataset = load_dataset("hf:owner/pets:small@v2", None)
    assert asked == [("owner/pets", "small", "v2", True)]
    assert dataset.counts() == {"train": 12, "val": 0, "test": 12, "classes": 3}
    assert contents(dataset) == EXPECTED
    assert "unsupervised is not used" in caplog.text
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("it is fetched twice"))
    assert load_dataset("hf:owner/pets:small@v2", None).train == dataset.train


@pytest.mark.parametrize("kind", ["text", "class"])
def test_a_column_of_splits_of_the_hub_is_used(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    names = ["train", "test"]
    feature = datasets.Value("string") if kind == "text" else datasets.ClassLabel(names=names)
    rows = {"image": [{"bytes": image, "path": None} for image in IMAGES], "label": LABELS}
    splits = [names[number // 9] if kind == "text" else number // 9 for number in range(12)]
    features = datasets.Features(image=datasets.Image(), label=datasets.Value("string"), Split=feature)
    data = datasets.Dataset.from_dict({**rows, "Split": splits}, features=features).to_iterable_dataset()
    for parts, counts in (({"train": data}, (9, 3)), ({"train": data, "test": data}, (12, 12))):
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, parts=parts, **__: datasets.IterableDatasetDict(parts))
        dataset = load_dataset(f"hf:owner/{kind}:{len(parts)}", None)
        assert (len(dataset.train), len(dataset.test), dataset.drawn_split) == (*counts, False)


def test_the_hub_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def load(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [])  # whether or not there is a network here
    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError, match=r"cannot be loaded.*Couldn't reach.*save_to_disk"):
        load_dataset("hf:owner/pets", None)
    with pytest.raises(DataError, match="write it as hf:OWNER/NAME"):
        load_dataset("hf:owner/pets/more", None)

    def unresolved(*_: object) -> None:
        raise socket.gaierror

    monkeypatch.setattr(socket, "getaddrinfo", unresolved)  # the library is not left to try again and again
    with pytest.raises(DataError, match=r"cannot be loaded.*cannot be resolved.*save_to_disk"):
        load_dataset("hf:owner/pets", None)
