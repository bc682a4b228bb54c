"""Images of collections, of which some cannot be read: the others are found all the same."""

import io
import os
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest
from inference_helpers import png

from maple.data.images import formats
from maple.errors import DataError
from maple.inference.sources.bulk_sources import list_units, read_unit
from maple.inference.sources.image_sources import ImageSource, find_images

IMAGE = png("red")


def outcomes(images: list[ImageSource]) -> list[str]:
    """Of each image "read", or why it cannot be."""
    found = []
    for image in images:
        try:
            image.read()
            found.append("read")
        except DataError as error:
            found.append(str(error))
    return found


def write_table(table: Path, **columns: list[object]) -> str:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table(columns), table)
    return str(table)


def test_a_pattern_with_two_stars_looks_into_all_folders(tmp_path: Path) -> None:
    places = ["a/b/two.png", "a/one.png", "top.png"]
    for place in places:
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_bytes(IMAGE)
    assert [image.name for image in find_images([f"{tmp_path}/**/*.png"])] == [
        str(tmp_path / place) for place in places
    ]


def test_a_pattern_below_a_folder_with_brackets(tmp_path: Path) -> None:
    paths = [tmp_path / "scans [v2]" / "a" / name for name in ("1.png", "2.png")]
    paths[0].parent.mkdir(parents=True)
    for path in paths:
        path.write_bytes(IMAGE)
    for pattern in ("*/*.png", "a/[12].png", "**/*.png"):
        found = [image.name for image in find_images([f"{tmp_path}/scans [v2]/{pattern}"])]
        assert found == [str(path) for path in paths]


def test_a_row_that_cannot_be_read_ends_no_table(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.png").write_bytes(IMAGE)
    table = write_table(tmp_path / "list.parquet", path=["a.png", "http://localhost/c.png", "b.png", None])
    first, address, second, absent = outcomes(list(find_images([table])))
    assert (first, second) == ("read", "read")
    assert "names the address 'http://localhost/c.png'; download its images" in address
    assert "has no image" in absent


def test_a_damaged_member_ends_no_zip(tmp_path: Path) -> None:
    archive = tmp_path / "pets.zip"
    with zipfile.ZipFile(archive, "w") as writer:
        for name in ("a", "b", "c"):
            writer.writestr(f"cat/{name}.png", IMAGE + name.encode())
    content = bytearray(archive.read_bytes())
    content[content.index(IMAGE + b"b") + 20] ^= 255
    archive.write_bytes(bytes(content))
    first, damaged, last = outcomes(list(find_images([str(archive)])))
    assert (first, last) == ("read", "read")
    assert "pets.zip#cat/b.png: cannot be read, it is damaged" in damaged


def test_members_of_the_current_folder_are_not_hidden(tmp_path: Path) -> None:
    """`tar -C FOLDER .` writes ./cat/1.png."""
    with tarfile.open(tmp_path / "pets.tar", "w") as archive, zipfile.ZipFile(tmp_path / "pets.zip", "w") as writer:
        for name in ("./cat/1.png", "./.cat/2.png", "./cat/./3.png", "./@eaDir/4.png"):
            info = tarfile.TarInfo(name)
            info.size = len(IMAGE)
            archive.addfile(info, io.BytesIO(IMAGE))
            writer.writestr(name, IMAGE)
    for path in (tmp_path / "pets.tar", tmp_path / "pets.zip"):
        names = sorted(image.name for image in find_images([str(path)]))
        assert names == [f"{path}#cat/1.png", f"{path}#cat/3.png"]


def test_an_archive_gives_what_its_folder_gives(tmp_path: Path) -> None:
    """Images without a known name, and formats that are not read, are neither lost nor other files."""
    files = {
        "cat/1.png": IMAGE,
        "cat/2": IMAGE,
        "cat/3.heic": struct.pack(">I", 24) + b"ftypheic" + bytes(4) + b"mif1heic",
        "cat/4.tga": bytes(100),
        "cat/5.cr3": struct.pack(">I", 24) + b"ftypcrx " + bytes(100_000),
        "cat/6": b"8BPS\0\1" + bytes(20),
        "cat/7.png": b"no image at all",
        "cat/notes.txt": b"BM is how a bitmap begins",
        "empty": b"",
    }
    folder = tmp_path / "pets"
    with tarfile.open(tmp_path / "pets.tar", "w") as archive, zipfile.ZipFile(tmp_path / "pets.zip", "w") as writer:
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
            archive.add(folder / name, name)
            writer.writestr(name, content)
    expected = outcomes(list(find_images([str(folder)], recursive=True)))
    assert [text == "read" for text in expected] == [True, True, False, False, False, False, False]
    for path in (tmp_path / "pets.tar", tmp_path / "pets.zip"):
        found = outcomes(list(find_images([str(path)])))
        assert [text.replace(f"{path}#", f"{folder}/") for text in found] == expected


def test_only_the_head_of_other_members_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "pets.zip", "w") as writer:
        writer.writestr("1.png", IMAGE)
        writer.writestr("2.mp4", bytes(10_000_000))
    sizes = []
    read = zipfile.ZipExtFile.read

    def counted(self: zipfile.ZipExtFile, n: int | None = -1) -> bytes:
        content = read(self, n)
        sizes.append(len(content))
        return content

    monkeypatch.setattr(zipfile.ZipExtFile, "read", counted)
    assert outcomes(list(find_images([str(tmp_path / "pets.zip")]))) == ["read"]
    assert sum(sizes) <= len(IMAGE) + formats.HEAD_BYTES


def test_labels_next_to_a_table_do_not_matter(tmp_path: Path) -> None:
    table = write_table(tmp_path / "images.parquet", image=[IMAGE, IMAGE])
    (tmp_path / "labels.txt").write_text("cat\ncat\n")
    assert outcomes(list(find_images([table]))) == ["read", "read"]


def test_a_table_with_two_columns_of_images_is_refused(tmp_path: Path) -> None:
    table = write_table(tmp_path / "images.parquet", front=[IMAGE], back=[IMAGE])
    (found,) = outcomes(list(find_images([table])))
    assert "which column holds the images is not clear; leave out the others" in found


@pytest.mark.skipif(os.name == "nt", reason="names of files are Unicode there")
def test_names_that_are_no_unicode_are_escaped(tmp_path: Path) -> None:
    pytest.importorskip("fsspec")
    (tmp_path / os.fsdecode(b"caf\xe9.png")).write_bytes(IMAGE)
    (unit,) = list_units([str(tmp_path)])
    (image,) = read_unit(unit)
    assert image.source == f"{tmp_path}/caf\\udce9.png"
    assert image.content == IMAGE
    assert not list(read_unit(unit, {image.source}))
