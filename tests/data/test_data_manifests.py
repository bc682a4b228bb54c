"""Tables of images: CSV, TSV and JSON lines."""

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from data_helpers import save_image

from maple.data import load_dataset, load_folder
from maple.data.folders.manifests import load_manifest
from maple.data.images.reading import read_image
from maple.errors import ConfigError, DataError
from maple.inference.sources.image_sources import find_images

FILES = ["cat/1.png", "cat/2.png", "dogs, big/1.png", "x.png", "Ünï/é.png"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for shade, path in enumerate(FILES):
        save_image(tmp_path / path, shade)
    return tmp_path


def write(folder: Path, text: str | bytes, name: str = "images.csv") -> str:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


DIVIDED = (
    'path,label,split\ncat/1.png,cat,train\n"dogs, big/1.png","dog, ""big""",train\ncat/2.png,cat,val\nx.png,cat,test\n'
)


def test_a_divided_manifest(folder: Path) -> None:
    dataset = load_dataset(write(folder, DIVIDED), None)
    assert (dataset.name, dataset.root, dataset.drawn_split) == ("images", folder, False)
    assert dataset.class_names == ("cat", 'dog, "big"')
    assert [(item.path, item.label) for item in dataset.train] == [("cat/1.png", 0), ("dogs, big/1.png", 1)]
    assert [item.path for item in dataset.val] == ["cat/2.png"]
    assert [item.path for item in dataset.test] == ["x.png"]
    assert dataset.store().get("x.png").size == (12, 10)


@pytest.mark.parametrize(
    "text",
    [
        "\ufeff" + DIVIDED,
        "\ufeff" + DIVIDED.replace("\n", "\r\n"),
        DIVIDED.replace("path,label,split", " Path ,LABEL,Split"),
        DIVIDED.replace("\n", "\n\n"),
        DIVIDED.replace("val\n", "Validation\n").replace("test", " Test "),
        DIVIDED.replace("cat/1.png", "cat\\1.png").replace("x.png", "./x.png"),
        "note," + DIVIDED.replace("\n", "\n1,").removesuffix("1,"),
    ],
)
def test_what_spreadsheets_make_of_it_reads_the_same(text: str, folder: Path) -> None:
    assert load_dataset(write(folder, text), None) == load_dataset(write(folder, DIVIDED), None)


@pytest.mark.parametrize(("mark", "name"), [(";", "images.csv"), ("\t", "images.csv"), ("\t", "images.tsv")])
def test_other_delimiters(mark: str, name: str, folder: Path) -> None:
    text = mark.join(("path", "label")) + "\n" + "".join(f"{path}{mark}{path[0]}\n" for path in FILES[:3])
    dataset = load_dataset(write(folder, text, name), None, test_fraction=0)
    assert [item.path for item in dataset.train] == FILES[:3]


@pytest.mark.parametrize("name", ["images.jsonl", "images.ndjson", "IMAGES.JSONL"])
def test_json_lines(name: str, folder: Path) -> None:
    rows = [
        {"path": "cat/1.png", "label": "cat", "split": "train", "more": [1]},
        {"path": "dogs, big/1.png", "label": 'dog, "big"', "split": "train"},
        {"path": "cat/2.png", "label": "cat", "split": "val"},
        {"path": "x.png", "label": "cat", "split": "test"},
    ]
    read = load_dataset(write(folder, "\n".join(map(json.dumps, rows)) + "\n\n", name), None)
    expected = load_dataset(write(folder, DIVIDED), None)
    assert (read.train, read.val, read.test) == (expected.train, expected.val, expected.test)


@pytest.mark.parametrize("name", ["images.csv", "images.tsv", "images.jsonl"])
def test_columns_are_named(name: str, folder: Path) -> None:
    rows = [
        {"File": "cat/1.png", "path": "a", "label": "animal", "Species": "cat"},
        {"File": "cat/2.png", "path": "b", "label": "animal", "Species": "cat"},
        {"File": "x.png", "path": "c", "label": "thing", "Species": "dog"},
    ]
    table = "\n".join(",".join(row) for row in (rows[0], *(row.values() for row in rows)))
    text = "\n".join(map(json.dumps, rows)) if name.endswith("l") else table
    manifest = write(folder, text, name)
    dataset = load_dataset(manifest, None, test_fraction=0, image_column="file", label_column="species")
    assert [(item.path, item.class_name) for item in dataset.train] == [
        *(("cat/1.png", "cat"), ("cat/2.png", "cat"), ("x.png", "dog"))
    ]
    with pytest.raises(DataError, match=r"unknown column 'Kind'; choose one of: file, path, label, species"):
        load_dataset(manifest, None, label_column="Kind")
    with pytest.raises(DataError, match=r"line 2: path 'a' is|3 of 3 images are missing"):
        load_dataset(manifest, None, label_column="species")


def test_a_column_of_splits_may_be_the_labels(folder: Path) -> None:
    dataset = load_dataset(write(folder, "path,split\ncat/1.png,north\nx.png,south\n"), None, label_column="split")
    assert dataset.class_names == ("north", "south")


def test_the_metadata_of_an_image_folder_of_hugging_face(folder: Path) -> None:
    rows = [{"file_name": "cat/1.png", "label": "cat"}, {"file_name": "x.png", "label": "dog"}]
    lines = "\n".join(map(json.dumps, rows))
    table = "file_name,label\ncat/1.png,cat\nx.png,dog\n"
    for manifest in (write(folder, table, "metadata.csv"), write(folder, lines, "metadata.jsonl")):
        dataset = load_dataset(manifest, None, test_fraction=0)
        assert [(item.path, item.class_name) for item in dataset.train] == [("cat/1.png", "cat"), ("x.png", "dog")]


def test_columns_of_class_folders_are_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for domain in ("art", "photo"):
        for name in ("cat", "dog"):
            save_image(tmp_path / "pets" / domain / name / "1.png")
    for source in (tmp_path / "pets" / "art", f"{tmp_path / 'pets'}:art"):
        for columns in ({"image_column": "file"}, {"label_column": "species"}):
            caplog.clear()
            assert load_dataset(str(source), None, **columns).class_names == ("cat", "dog")
            assert f"data.{next(iter(columns))} is not used; give the table" in caplog.text


def test_labels_are_sorted_normalised_and_may_be_numbers(folder: Path) -> None:
    rows = [("cat/1.png", "e\u0301"), ("cat/2.png", "\u00e9"), ("x.png", "B"), ("Ünï/é.png", 7)]
    text = "\n".join(json.dumps({"path": path, "label": label, "split": None}) for path, label in rows)
    manifest = write(folder, text, "x.jsonl")
    assert load_dataset(manifest, None).class_names == ("7", "B", "\u00e9")
    assert load_dataset(manifest, None, class_names={"7": "seven"}).class_names == ("seven", "B", "\u00e9")


def test_a_class_list_names_whole_numbers(folder: Path) -> None:
    (folder / "classnames.txt").write_text("tabby cat\nkoala\nant bear\n")
    text = "path,label\ncat/1.png,2\nx.png,0\n"
    lines = '{"path": "cat/1.png", "label": 2}\n{"path": "x.png", "label": 0}\n'
    for manifest in (write(folder, text), write(folder, lines, "images.jsonl")):
        dataset = load_dataset(manifest, None, test_fraction=0)
        assert dataset.class_names == ("tabby cat", "ant bear")
        assert [(item.path, item.label) for item in dataset.train] == [("x.png", 0), ("cat/1.png", 1)]
    for number in (3, -1):
        with pytest.raises(DataError, match=rf"line 3 has the label {number}, but there are 3 class names, for 0 to 2"):
            load_dataset(write(folder, text.replace("x.png,0", f"x.png,{number}")), None)
    assert load_dataset(write(folder, text.replace("x.png,0", "x.png,1a")), None).class_names == ("1a", "2")


def test_an_undivided_manifest_is_split_like_the_folder_it_describes(tmp_path: Path) -> None:
    paths = [save_image(tmp_path / f"pets/{name}/{number}.png") for name in ("cat", "dog") for number in range(9)]
    rows = "".join(f"{path.relative_to(tmp_path / 'pets')},{path.parent.name},\n" for path in paths)
    manifest = load_dataset(write(tmp_path / "pets", "path,label,split\n" + rows), None, seed=3, val_fraction=0.2)
    folder = load_folder(tmp_path / "pets", seed=3, val_fraction=0.2)
    assert manifest.drawn_split
    assert (manifest.train, manifest.val, manifest.test) == (folder.train, folder.val, folder.test)


def test_val_without_test_is_the_test_part_and_a_manifest_may_be_for_evaluation_only(folder: Path) -> None:
    text = "path,label,split\ncat/1.png,a,train\nx.png,b,val\n"
    assert load_dataset(write(folder, text), None).counts() == {"train": 1, "val": 0, "test": 1, "classes": 2}
    only = load_dataset(write(folder, text.replace("train", "test").replace("val", "test")), None)
    assert only.counts() == {"train": 0, "val": 0, "test": 2, "classes": 2}


def test_absolute_paths_inside_its_folder_are_made_relative(folder: Path) -> None:
    text = f"path,label\n{folder / 'x.png'},a\ncat/1.png,b\n"
    dataset = load_dataset(write(folder, text), None, test_fraction=0)
    assert [item.path for item in dataset.train] == ["x.png", "cat/1.png"]


HEAD = "path,label,split\ncat/1.png,cat,train\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", r"images.csv: is empty; its first line must name the columns"),
        ("path,label\n", "holds no rows below its header"),
        ("file,class\na,b\n", "it has no path and no label but 'file', 'class'"),
        ("cat/1.png,cat\n", "it has no path and no label but 'cat/1.png', 'cat'"),
        ("path,label,Label\na,b,c\n", "names the column label 2 times"),
        ("path,label\ncat/1.png,cat\nx.png,cat\n", "has only one class, 'cat'"),
        (HEAD + "x.png,dog,tset\n", r"line 3: unknown split 'tset'; choose one of: train, val, test"),
        (HEAD + "x.png,dog,\n", r"line 3 has no split, but line 2 has 'train'"),
        (HEAD + "x.png,,train\n", r"line 3 has the label ''; give the name of the class of x.png"),
        (HEAD + "x.png, ,train\n", r"line 3 has the label ' '"),
        (HEAD + ",dog,train\n", r"line 3 has the path ''"),
        (HEAD + "x.png,dog\n", r"line 3 has 2 values, but there are 3 columns \(path, label, split\)"),
        (HEAD + "x.png,dog, big,train\n", r"line 3 has 4 values, .* put values that hold ',' in double quotes"),
        (HEAD + "cat/1.png,cat,train\n", r"line 3 repeats 'cat/1.png' of line 2;"),
        (HEAD + "\n./cat/1.png,dog,test\n", r"line 4 repeats .* line 2, with \('cat', 'train'\) there and \('dog', 't"),
        (HEAD + "y.png,dog,train\nz.png,dog,test\n", r"2 of 3 images are missing \(line 3: .*y.png; line 4: .*z.png\)"),
        (HEAD + "".join(f"{i},dog,test\n" for i in range(9)), r"9 of 10 images .*line 7: [^;]* and 4 more\)"),
        (HEAD + "y" * 5000 + ".png,dog,train\n", r"1 of 2 images are missing \(line 3: [^ ]*\.png\); paths"),
        (HEAD + "../x.png,dog,train\n", r"line 3: path '../x.png' leaves the folder"),
        (HEAD + "..\\x.png,dog,train\n", r"line 3: path '../x.png' leaves the folder"),
        (HEAD + "/etc/hosts,dog,train\n", r"line 3: path '/etc/hosts' leaves the folder"),
        (HEAD + '"x.png,dog,train\n', r"line 3 cannot be read"),
        (HEAD + '"x.png"y,dog,train\n', r"line 3 cannot be read"),
        (HEAD + "x.png,dog" + "g" * 200_000 + ",train\n", r"line 3 cannot be read \(field larger"),
        (HEAD.encode() + b"\xe9.png,dog,train\n", r"is not UTF-8 text \(.* at byte 37\); save it as CSV UTF-8"),
        (HEAD.encode("utf-16"), "is not UTF-8 text"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(text: str | bytes, message: str, folder: Path) -> None:
    manifest = write(folder, text)
    with pytest.raises(DataError, match=message) as caught:
        load_dataset(manifest, None)
    assert str(caught.value).startswith(manifest)


def test_quoted_line_breaks_are_counted(folder: Path) -> None:
    text = 'path,label,note\ncat/1.png,cat,"two\nlines"\n\nx.png,dog,"a\nb"\nx.png,dog,\n'
    with pytest.raises(DataError, match=r"line 7 repeats 'x.png' of line 5"):
        load_dataset(write(folder, text), None)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ("[1]", "line 2 must be an object such as"),
        ('{"path": "x.png"}', "line 2 must be an object such as"),
        ('{"path": 3, "label": "b"}', "line 2 has the path 3"),
        ('{"path": "x.png", "label": true}', "line 2 has the label True"),
        ('{"path": "x.png", "label": null}', "line 2 has the label None"),
        ('{"path": "x.png", "label": "b", "split": 1}', "line 2 has the split 1; it must be train, val or test"),
        ('{"path": "x.png", "label": "b\\ud800"}', r"line 2 has the label 'b\\ud800', which holds half a character"),
        ("[" * 100_000, "line 2 is not JSON"),
    ],
)
def test_json_lines_that_are_wrong(line: str, message: str, folder: Path) -> None:
    manifest = write(folder, '{"path": "cat/1.png", "label": "a"}\n' + line + "\n", "x.jsonl")
    with pytest.raises(DataError, match=message):
        load_dataset(manifest, None)


def test_fractions_and_other_files(folder: Path) -> None:
    with pytest.raises(ConfigError, match="must sum to less than 1"):
        load_dataset(write(folder, DIVIDED), None, test_fraction=1)
    with pytest.raises(DataError, match=r"a \.csv or \.jsonl file with the columns path and label"):
        load_dataset(write(folder, DIVIDED, "images.txt"), None)
    with pytest.raises(DataError, match="unknown data set"):
        load_dataset(str(folder / "absent.csv"), None)


def write_rows(path: Path, rows: dict[str, str]) -> Path:
    path.write_text("path,label\n" + "".join(f'"{name}",{label}\n' for name, label in rows.items()), encoding="utf-8")
    return path


@pytest.mark.parametrize("written", ["{top}/link/", "{top}/real/", "{top}/link/../real/", "../real/", "cat/../", ".\\"])
@pytest.mark.parametrize("reached", ["real", "link", "chain"])
def test_paths_lead_into_the_folder_however_it_is_reached(tmp_path: Path, written: str, reached: str) -> None:
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "chain").symlink_to("link")
    rows = {}
    for number in range(4):
        name = ("cat", "dog")[number % 2]
        save_image(tmp_path / f"real/{name}/{number}.png")
        rows[written.format(top=tmp_path) + f"{name}/{number}.png"] = name
    write_rows(tmp_path / "real/images.csv", rows)
    dataset = load_manifest(tmp_path / reached / "images.csv", test_fraction=0)
    assert {item.path for item in dataset.train} == {"cat/0.png", "dog/1.png", "cat/2.png", "dog/3.png"}


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        ("../other/x.png", "leaves the folder"),
        ("{top}/other/x.png", "leaves the folder"),
        ("C:\\photos\\x.png", "leaves the folder"),
        ("file://{top}/real/cat/0.png", "is an address"),
        ("https://example.org/x.png", "is an address"),
        ("cat/..", "leaves the folder"),
    ],
)
def test_paths_that_lead_elsewhere_are_refused(tmp_path: Path, written: str, reason: str) -> None:
    save_image(tmp_path / "real/cat/0.png")
    save_image(tmp_path / "other/x.png")
    table = write_rows(tmp_path / "real/images.csv", {"cat/0.png": "cat", written.format(top=tmp_path): "dog"})
    with pytest.raises(DataError, match=rf"line 3: path .* {reason}.*relative to it"):
        load_manifest(table)


@pytest.mark.parametrize("stored", ["NFC", "NFD"])
@pytest.mark.parametrize("written", ["NFC", "NFD"])
def test_paths_are_found_in_either_unicode_form(tmp_path: Path, stored: Any, written: Any) -> None:
    def name(form: Any, number: int) -> str:
        return unicodedata.normalize(form, f"chien été/à côté/é{number}.png")

    for number in range(4):
        save_image(tmp_path / name(stored, number))
    for prefix in ("", f"{tmp_path}/"):
        rows = {prefix + name(written, number): ("chat", "chien")[number % 2] for number in range(4)}
        dataset = load_manifest(write_rows(tmp_path / "images.csv", rows), test_fraction=0)
        assert {item.path for item in dataset.train} == {name(stored, number) for number in range(4)}
    assert read_image(tmp_path / name(written, 0)).size == (12, 10)
    folder = tmp_path / Path(name(written, 0)).parent
    assert len([image.read() for image in find_images([str(folder)])]) == 4


def test_the_very_name_comes_first_where_both_forms_exist(tmp_path: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "été") for form in ("NFC", "NFD"))
    for folder, numbers in ((composed, (0, 1)), (decomposed, (0, 1, 2))):
        for number in numbers:
            save_image(tmp_path / folder / f"{number}.png")
    if len(list(tmp_path.iterdir())) == 1:
        pytest.skip("this file system has one form only")
    rows = {f"{composed}/{number}.png": ("a", "b")[number % 2] for number in range(3)}
    dataset = load_manifest(write_rows(tmp_path / "images.csv", rows), test_fraction=0)
    assert {item.path for item in dataset.train} == {f"{composed}/0.png", f"{composed}/1.png", f"{decomposed}/2.png"}


@pytest.mark.parametrize("label", ["nan", "NaN", "None", "<NA>", ""])
def test_missing_labels_are_refused_with_their_line(tmp_path: Path, label: str) -> None:
    rows = {}
    for name in ("cat", "dog", "nan"):
        save_image(tmp_path / f"{name}/0.png")
        rows[f"{name}/0.png"] = name
    assert load_manifest(write_rows(tmp_path / "images.csv", rows)).class_names == ("cat", "dog", "nan")
    with pytest.raises(DataError, match=f"line 3 has the label '{label}'.* name of the class of dog/0.png"):
        load_manifest(write_rows(tmp_path / "images.csv", {**rows, "dog/0.png": label}))
