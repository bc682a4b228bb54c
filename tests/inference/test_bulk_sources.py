"""Image files, Parquet tables and shards at any fsspec place, read without a cluster."""

import io
import tarfile
from pathlib import Path
from typing import Any

import fsspec
import pytest
from inference_helpers import COLOURS, png

from maple.errors import ConfigError
from maple.inference.ray_predict import SourceSet
from maple.inference.sources import bulk_sources
from maple.inference.sources.bulk_sources import EncodedImage, list_units, read_unit

pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install 'maple-clip[ray]'")
import pyarrow.parquet as pq  # noqa: E402 - after the check

IMAGES = [png(colour) for colour in COLOURS.values()]


def read(*sources: str, skip: Any = frozenset(), **options: Any) -> list[EncodedImage]:
    return [image for unit in list_units(sources, **options) for image in read_unit(unit, skip)]


def names(images: list[EncodedImage]) -> list[str]:
    return [image.source for image in images]


def shard(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def test_a_folder_in_order_in_parts_and_each_file_once(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk_sources, "FILES_PER_UNIT", 2)
    images = read(str(pictures), str(pictures / "a.png"))
    assert names(images) == [f"{pictures}/{name}" for name in ("a.png", "b10.png", "b9.png", "d.png")]
    assert images[0].content == IMAGES[0]
    assert [image.path for image in images] == names(images)
    assert len(list_units([str(pictures)], recursive=True)) == 3, "five images, two at a time"
    assert len(read(f"{pictures}/b*.png")) == 2
    assert names(read(str(pictures), skip={f"{pictures}/a.png"}))[0] == f"{pictures}/b10.png"


def test_system_folders_are_skipped(tmp_path: Path) -> None:
    for folder in ("a", "@eaDir", ".hidden"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "1.png").write_bytes(IMAGES[0])
    assert names(read(str(tmp_path), recursive=True)) == [f"{tmp_path}/a/1.png"]


def test_another_filesystem() -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe({"/bulk/one.png": IMAGES[0], "/bulk/in/two.jpg": b"", "/bulk/notes.txt": b"x"})
    one, two = sorted(read("memory://bulk", recursive=True), key=lambda image: image.source, reverse=True)
    assert (one.source, one.content) == ("memory://bulk/one.png", IMAGES[0])
    assert (two.source, two.error) == ("memory://bulk/in/two.jpg", "memory://bulk/in/two.jpg: is empty (0 bytes)")
    memory.rm("/bulk", recursive=True)


def test_tables_of_bytes_structs_and_paths(tmp_path: Path) -> None:
    structs = [{"bytes": content, "path": f"{n}.png"} for n, content in enumerate(IMAGES)]
    pq.write_table(pa.table({"image": structs, "label": [0, 1, 2, 3]}), tmp_path / "a.parquet", row_group_size=3)
    pq.write_table(pa.table({"bytes": [IMAGES[0], None]}), tmp_path / "b.parquet")
    (tmp_path / "red.png").write_bytes(IMAGES[0])
    pq.write_table(pa.table({"path": ["red.png", "none.png"]}), tmp_path / "c.parquet")
    assert len(list_units([f"{tmp_path}/a.parquet"])) == 2, "row groups"
    images = read(*(f"{tmp_path}/{name}.parquet" for name in "abc"))
    assert names(images) == [
        *(f"{tmp_path}/a.parquet#{row}" for row in range(4)),
        *(f"{tmp_path}/{name}.parquet#{row}" for name in "bc" for row in range(2)),
    ]
    assert [image.path for image in images[:4]] == ["0.png", "1.png", "2.png", "3.png"]
    assert [image.content for image in images] == [*IMAGES, IMAGES[0], b"", IMAGES[0], b""]
    assert images[5].error == f"{tmp_path}/b.parquet#1: is empty (0 bytes)"
    assert images[7].error == "none.png: there is no such file"


def test_a_shard_is_read_up_to_where_it_is_damaged(tmp_path: Path) -> None:
    path = shard(
        tmp_path / "s.tar",
        {"1.png": IMAGES[0], "1.cls": b"3", "1.mask.png": IMAGES[1], "in/2.png": IMAGES[1], "._2.png": b"x"},
    )
    sources = [f"{path}#{member}" for member in ("1", "1.mask.png", "in/2")]
    assert names(read(str(path))) == sources
    assert names(read(str(path), skip=set(sources[:2]))) == sources[2:]
    path.write_bytes(path.read_bytes()[:2600])
    first, *_, last = read(str(path))
    assert first.content == IMAGES[0]
    assert last.source == f"{path}#"
    assert "cannot be read to its end" in str(last.error)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere", "nowhere: there is no such file or folder"),
        ("none*.png", "none.*holds no images, Parquet files or shards"),
        ("nosuch://bucket", "nosuch://bucket: cannot be opened .*fsspec URL"),
        ("", "give image files, folders"),
        ("labels.parquet", r"no column of images was recognised; its columns are label, x"),
        ("text.parquet", "text.parquet: cannot be read as a Parquet file"),
    ],
)
def test_refused_sources(source: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pq.write_table(pa.table({"label": [1], "x": [b"1"], "y": [b"2"]}), "labels.parquet")
    Path("text.parquet").write_text("text")
    with pytest.raises(ConfigError, match=message):
        list_units([source])


def test_set_of_sources() -> None:
    sources = [f"photos/{number}.png" for number in range(2000)]
    known = SourceSet(sources[:1500])
    assert [source in known for source in sources] == [True] * 1500 + [False] * 500
    assert len(known) == 1500
    assert "a" not in SourceSet([])
