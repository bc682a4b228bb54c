"""Archives, honest and hostile."""

import bz2
import gzip
import io
import lzma
import os
import stat
import tarfile
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from data_helpers import UnflaggedInfo

from maple.data.published import unpack as module
from maple.data.published.prepare import PrepareProgress, _find, _unpacked
from maple.data.published.unpack import is_archive, unpack
from maple.errors import DownloadError

FILES = {"a/x.jpg": b"one", "a/b/y.jpg": b"two" * 1000, "top.txt": b""}


def zipped(path: Path, files: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def zipped_kind(path: Path, name: str | zipfile.ZipInfo, kind: int, content: bytes) -> Path:
    info = zipfile.ZipInfo(name) if isinstance(name, str) else name
    info.create_system = 3
    info.external_attr = (kind | 0o777) << 16
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.jpg", b"one")
        archive.writestr(info, content)
    return path


def tarred(path: Path, files: dict[str, bytes], *extra: tarfile.TarInfo, mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(content), 0o4777
            archive.addfile(info, io.BytesIO(content))
        for info in extra:
            archive.addfile(info)
    return path


def member(name: str, kind: bytes, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def found(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("suffix", "mode"), [("tar", "w"), ("tar.gz", "w:gz"), ("tgz", "w:xz"), ("tar.bz2", "w:bz2")])
def test_tar(suffix: str, mode: str, tmp_path: Path) -> None:
    archive = tarred(tmp_path / f"x.{suffix}", FILES, member("empty", tarfile.DIRTYPE), mode=mode)
    assert is_archive(archive)
    pieces: list[int] = []
    assert unpack(archive, tmp_path / "out", on_bytes=pieces.append) == 3
    assert found(tmp_path / "out") == FILES
    assert (tmp_path / "out/empty").is_dir()
    assert sum(pieces) == 3003
    assert not (tmp_path / "out/a/x.jpg").stat().st_mode & (stat.S_ISUID | stat.S_IXUSR)


def test_zip(tmp_path: Path) -> None:
    archive = zipped(tmp_path / "x.ZIP", {**FILES, "empty/": b""})
    assert is_archive(archive)
    assert not is_archive(tmp_path / "split.json")
    assert unpack(archive, tmp_path / "out") == 3
    assert found(tmp_path / "out") == FILES
    assert (tmp_path / "out/empty").is_dir()


@pytest.mark.parametrize(
    ("encoding", "name", "expected"),
    [
        ("utf-8", "\u00e9t\u00e9/1.jpg", "\u00e9t\u00e9/1.jpg"),  # as Archive Utility of macOS writes it
        ("cp437", "\u00e9t\u00e9/1.jpg", "\u00e9t\u00e9/1.jpg"),
        ("gbk", "\u732b/1.jpg", "\u251c\u00bf/1.jpg"),  # these two bytes alone would also be a letter in UTF-8
    ],
)
def test_names_of_a_zip_that_does_not_tell_their_encoding(
    encoding: str, name: str, expected: str, tmp_path: Path
) -> None:
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(UnflaggedInfo(name, encoding), b"one")
        archive.writestr(UnflaggedInfo("\u72d7/1.jpg" if encoding != "cp437" else "\u00e4/1.jpg", encoding), b"two")
        archive.writestr("\u72d7/2.jpg", b"three")
    unpack(path, tmp_path / "out")
    unpacked = found(tmp_path / "out")
    assert unpacked[expected] == b"one"
    assert unpacked["\u72d7/2.jpg"] == b"three"
    with zipfile.ZipFile(path) as archive:
        names, problem = module.zip_names(archive.infolist())
    assert set(names) == set(unpacked)
    assert ("encoding of 2 file names is unknown" in problem) == (encoding != "utf-8")


def test_links_inside(tmp_path: Path) -> None:
    """A hard link is the same image again; a symbolic one would be a name only."""
    extra = [member("a/z.jpg", tarfile.LNKTYPE, "a/x.jpg"), member("a/s.jpg", tarfile.SYMTYPE, "../a/x.jpg")]
    unpack(tarred(tmp_path / "x.tar", FILES, *extra), tmp_path / "out")
    assert found(tmp_path / "out") == {**FILES, "a/z.jpg": b"one"}
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    unpack(zipped_kind(tmp_path / "x.zip", "s", stat.S_IFLNK, b"a.jpg"), tmp_path / "out2")
    assert found(tmp_path / "out2") == {"a.jpg": b"one"}


HOSTILE: dict[str, Callable[[Path], Path]] = {
    "zip, parent": lambda path: zipped(path, {"../evil.txt": b"x"}),
    "zip, deep parent": lambda path: zipped(path, {"a/../../evil.txt": b"x"}),
    "zip, backslash": lambda path: zipped(path, {"..\\evil.txt": b"x"}),
    "zip, absolute": lambda path: zipped(path, {"/tmp/evil.txt": b"x"}),
    "zip, drive": lambda path: zipped(path, {"C:/evil.txt": b"x"}),
    "zip, link out": lambda path: zipped_kind(path, "s", stat.S_IFLNK, b"/etc"),
    "zip, link up": lambda path: zipped_kind(path, "a/s", stat.S_IFLNK, b"../../x"),
    "zip, parent in UTF-8": lambda path: zipped_kind(path, UnflaggedInfo("../\u00e9.txt"), stat.S_IFREG, b"x"),
    "zip, pipe": lambda path: zipped_kind(path, "s", stat.S_IFIFO, b""),
    "zip, device": lambda path: zipped_kind(path, "s", stat.S_IFBLK, b""),
    "tar, parent": lambda path: tarred(path, {"../evil.txt": b"x"}),
    "tar, absolute": lambda path: tarred(path, {"/tmp/evil.txt": b"x"}),
    "tar, link out": lambda path: tarred(path, FILES, member("s", tarfile.SYMTYPE, "/etc")),
    "tar, link up": lambda path: tarred(path, FILES, member("a/s", tarfile.SYMTYPE, "../../x")),
    "tar, hard link out": lambda path: tarred(path, FILES, member("s", tarfile.LNKTYPE, "/etc/passwd")),
    "tar, hard link up": lambda path: tarred(path, FILES, member("s", tarfile.LNKTYPE, "../x")),
    "tar, pipe": lambda path: tarred(path, FILES, member("s", tarfile.FIFOTYPE)),
    "tar, device": lambda path: tarred(path, FILES, member("s", tarfile.CHRTYPE)),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_nothing_leaves_the_folder(kind: str, tmp_path: Path) -> None:
    archive = HOSTILE[kind](tmp_path / ("x.zip" if kind.startswith("zip") else "x.tar"))
    with pytest.raises(DownloadError, match=r"leaves its folder|is a device or pipe") as caught:
        unpack(archive, tmp_path / "in/out")
    assert str(caught.value).startswith(str(archive))
    assert [path.name for path in tmp_path.iterdir() if path != archive] in ([], ["in"])
    assert not Path("/tmp/evil.txt").exists()
    assert all(path.is_dir() or path.is_file() for path in tmp_path.rglob("*"))


def test_a_hard_link_to_a_folder_becomes_an_empty_file(tmp_path: Path) -> None:
    extra = [member("empty", tarfile.DIRTYPE), member("z", tarfile.LNKTYPE, "empty")]
    unpack(tarred(tmp_path / "x.tar", {}, *extra), tmp_path / "out")
    assert found(tmp_path / "out") == {"z": b""}


def test_a_link_is_not_written_through(tmp_path: Path) -> None:
    """A link inside, then a file below it: no link is made, so the file lands in the folder."""
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as archive:
        archive.addfile(member("a", tarfile.DIRTYPE))
        archive.addfile(member("s", tarfile.SYMTYPE, "a"))
        info = tarfile.TarInfo("s/y.txt")
        info.size = 3
        archive.addfile(info, io.BytesIO(b"two"))
    unpack(path, tmp_path / "out")
    assert found(tmp_path / "out") == {"s/y.txt": b"two"}


def test_bombs(tmp_path: Path) -> None:
    bomb = zipped(tmp_path / "x.zip", {f"{number}.txt": bytes(2_000_000) for number in range(3)})
    assert bomb.stat().st_size < 10_000
    with pytest.raises(DownloadError, match=r"unpacks to more than 5000000 bytes \(at '2.txt'\)"):
        unpack(bomb, tmp_path / "out", max_bytes=5_000_000)
    assert sum(len(content) for content in found(tmp_path / "out").values()) <= 5_000_000
    tar = tarred(tmp_path / "x.tar.gz", {"x.txt": bytes(2_000_000)}, mode="w:gz")
    with pytest.raises(DownloadError, match="unpacks to more than 1000 bytes"):
        unpack(tar, tmp_path / "out2", max_bytes=1000)
    many = tarred(tmp_path / "many.tar", {f"{number}": b"" for number in range(30)})
    with pytest.raises(DownloadError, match="holds more than 20 files"):
        unpack(many, tmp_path / "out3", max_files=20)
    deep = tarred(tmp_path / "deep.tar", {f"{number}/a/b/c/d/e/x": b"" for number in range(9)})
    with pytest.raises(DownloadError, match="holds more than 40 files and folders"):
        unpack(deep, tmp_path / "out4", max_files=40)


def test_links_cannot_multiply_content(tmp_path: Path) -> None:
    links = [member(f"{number}.txt", tarfile.LNKTYPE, "x.txt") for number in range(9)]
    tar = tarred(tmp_path / "x.tar", {"x.txt": bytes(1000)}, *links)
    with pytest.raises(DownloadError, match="unpacks to more than 5000 bytes"):
        unpack(tar, tmp_path / "out", max_bytes=5000)


def test_an_announced_size_is_not_believed(tmp_path: Path) -> None:
    """The size in the directory of the zip is changed from 2,000,000 to 10."""
    path = zipped(tmp_path / "x.zip", {"x.txt": bytes(2_000_000)})
    path.write_bytes(path.read_bytes().replace((2_000_000).to_bytes(4, "little"), (10).to_bytes(4, "little")))
    with pytest.raises(DownloadError):
        unpack(path, tmp_path / "out", max_bytes=1000)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([("x.txt", b"1"), ("x.txt", b"2")], "comes twice"),
        ([("x", b"1"), ("x/y.txt", b"2")], "is a file and a folder"),
        ([("x" * 300, b"1")], "has too long a name"),
        ([("x/" * 2500 + "y", b"1")], "has too long a name"),
    ],
)
def test_members_that_cannot_be(files: list[tuple[str, bytes]], message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as archive:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    with pytest.raises(DownloadError, match=message):
        unpack(path, tmp_path / "out")


@pytest.mark.parametrize("cut", [0, 10, 1000, 3000])
@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
def test_damaged_archives(kind: str, cut: int, tmp_path: Path) -> None:
    files = {"x.bin": os.urandom(6000)}
    path = tmp_path / f"x.{kind}"
    if kind == "zip":
        zipped(path, files)
    else:
        tarred(path, files, mode="w:gz" if kind == "tar.gz" else "w")
    content = path.read_bytes()[:cut]
    path.write_bytes(content)
    with pytest.raises(DownloadError, match=r"is damaged or not an archive|cannot be read"):
        unpack(path, tmp_path / "out")


def test_a_changed_byte_is_found(tmp_path: Path) -> None:
    path = zipped(tmp_path / "x.zip", {"x.bin": os.urandom(6000)}, zipfile.ZIP_STORED)
    content = bytearray(path.read_bytes())
    content[3000] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(DownloadError, match="is damaged"):
        unpack(path, tmp_path / "out")


def test_an_encrypted_archive_is_said_to_be_so(tmp_path: Path) -> None:
    path = zipped(tmp_path / "x.zip", {"x.bin": b"secret"}, zipfile.ZIP_STORED)
    content = bytearray(path.read_bytes())
    content[6] |= 1
    content[content.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(bytes(content))
    with pytest.raises(DownloadError, match=r"cannot be unpacked .*encrypted"):
        unpack(path, tmp_path / "out")


def block(name: str, size: int = 0, kind: bytes = b"0", link: str = "", content: bytes = b"") -> bytes:
    """A member of a tar archive, whose header may claim another size than that of its content."""
    info = member(name, kind, link)
    info.size = size or len(content)
    return info.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512)


def pax(record: str, kind: bytes = b"x") -> bytes:
    length = next(n for n in range(len(record), len(record) + 9) if len(f"{n} {record}\n") == n)
    return block("pax", kind=kind, content=f"{length} {record}\n".encode())


def big_dictionary() -> bytes:
    """An xz archive that asks for a dictionary of 1.5 GiB."""
    stream = bytearray(lzma.compress(block("a"), preset=0))
    length = (stream[12] + 1) * 4
    header = stream[12 : 12 + length - 4]
    header[header.index(b"\x21\x01") + 2] = 37
    stream[12 : 12 + length] = header + zlib.crc32(header).to_bytes(4, "little")
    return bytes(stream)


A = block("images/a.jpg", content=b"one")
SPARSE = pax("GNU.sparse.major=1") + pax("GNU.sparse.minor=0")
TARS = {
    "an extended header of gigabytes": A + block("x", 6 << 30, b"x"),
    "a global header of gigabytes": A + block("x", 6 << 30, b"g"),
    "a long name of gigabytes": A + block("x", 6 << 30, b"L"),
    "a long link of gigabytes": A + block("x", 6 << 30, b"K"),
    "the same, compressed": gzip.compress(A + block("x", 6 << 30, b"L") + bytes(8 << 20)),
    "long names without end": A + block("x", kind=b"L", content=b"long") * 5000,
    "extended headers without end": A + pax("comment=x") * 5000,
    "large long names": A + block("x", kind=b"L", content=bytes(600_000)) * 2 + A,
    "only symbolic links": b"".join(block(f"{number}", kind=b"2", link="x") for number in range(20_000)),
    "a chain of hard links": b"".join(block(f"{n + 1}", kind=b"1", link=f"{n}") for n in range(2000)),
    "a hard link to itself": block("a", kind=b"1", link="a"),
    "a hard link to a link": A + block("s", kind=b"2", link="images/a.jpg") + block("h", kind=b"1", link="s"),
    "a size of 30 digits": pax("size=" + "9" * 30) + A,
    "a size below zero": pax("size=-2048") + A,
    "a hole of terabytes": pax("GNU.sparse.realsize=" + "9" * 13) + A,
    "a map of holes that is text": pax("GNU.sparse.map=x,y") + A,
    "a map of holes without an end": gzip.compress(
        SPARSE + block("a", 4 << 30, content=b"9" * 9 + b"\n" + b"1\n" * (2 << 20))
    ),
    "a name with a null": pax("path=a\0b") + A,
    "a link with a null": pax("linkpath=a\0b") + block("s", kind=b"2", link="x"),
    "a drive of Windows": block("C:evil.txt", content=b"x"),
    "2,000 folders": pax("path=" + "d/" * 2000 + "x") + A,
    "a file for its folder": block(".", content=b"x"),
    "no name": block("", content=b"x"),
    "a damaged header in the middle": A + b"A" * 512 + block("images/b.jpg", content=b"two"),
    "an end in a header": A + block("images/b.jpg")[:100],
    "gigabytes, gzip": gzip.compress(block("a", 60 << 30) + bytes(8 << 20)),
    "gigabytes, bz2": bz2.compress(block("a", 60 << 30) + bytes(8 << 20)),
    "gigabytes, xz": lzma.compress(block("a", 60 << 30) + bytes(8 << 20)),
    "a dictionary of gigabytes": big_dictionary(),
    "the same in a second stream": lzma.compress(A) + big_dictionary(),
    "bz2, cut": bz2.compress(os.urandom(600))[:400],
    "nothing": bytes(10240),
}


def zip_bytes(files: list[tuple[str, bytes]], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", compression) as archive:
        for name, content in files:
            archive.writestr(name, content)
    return data.getvalue()


def changed(content: bytes, position: int, value: bytes, signature: bytes = b"PK\1\2") -> bytes:
    """Change bytes of the first entry in the table of contents, or of the end of it."""
    start = content.index(signature) + position
    return content[:start] + value + content[start + len(value) :]


def overlapping() -> bytes:
    """A table of contents that names one member 400 times."""
    content = zip_bytes([("a", os.urandom(3000))])
    start, end = content.index(b"PK\1\2"), content.index(b"PK\5\6")
    table = content[start:end] * 400
    counts = (400).to_bytes(2, "little") * 2 + len(table).to_bytes(4, "little")
    return content[:start] + table + changed(content[end:], 8, counts, b"PK\5\6")


ONE = zip_bytes([("images/a.jpg", b"one")])
ZIPS = {
    "a size of gigabytes": changed(zip_bytes([("a", b"x")]), 24, (2 << 30).to_bytes(4, "little")),
    "members that overlap": overlapping(),
    "bzip2, which zipfile reads without a limit": zip_bytes([("a", bytes(9000))], zipfile.ZIP_BZIP2),
    "lzma": zip_bytes([("a", bytes(9000))], zipfile.ZIP_LZMA),
    "an unknown compression": changed(ONE, 10, b"\x63"),
    "twice": zip_bytes([("aaa", b"1"), ("bbb", b"2")]).replace(b"bbb", b"aaa"),
    "a file and a folder": zip_bytes([("a", b"1"), ("a/b", b"2")]),
    "a name that is not UTF-8": changed(changed(ONE, 9, b"\x08"), 46, b"\xff"),
    "a member elsewhere": changed(ONE, 42, b"\xf0\xff\xff\x7f"),
    "a table of contents of 2 GiB": changed(ONE, 12, b"\xff\xff\xff\x7f", b"PK\5\6"),
    "a table of contents elsewhere": changed(ONE, 16, b"\xff\xff\xff\xff", b"PK\5\6"),
    "only the start": b"PK\3\4" + bytes(4),
}


@pytest.mark.parametrize("kind", [*TARS, *ZIPS])
def test_hostile_archives_are_refused_within_little_memory(kind: str, tmp_path: Path) -> None:
    """As `prepare` unpacks them: in a temporary folder that disappears."""
    archive = tmp_path / "x.tar"
    archive.write_bytes(TARS.get(kind, b"") or ZIPS[kind])
    tracemalloc.start()
    try:
        with (
            pytest.raises(DownloadError, match=r"^/.*x.tar: (is|cannot|holds|unpacks|member)") as caught,
            _unpacked(archive, tmp_path / "root/images", PrepareProgress(), None) as folder,
        ):
            _find(folder, "images", archive)
        assert tracemalloc.get_traced_memory()[1] < 100 << 20
    finally:
        tracemalloc.stop()
    assert "make room" not in str(caught.value) or "elsewhere" in kind
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["root", "x.tar"]


def test_a_zip_at_the_end_of_a_tar_is_one_of_its_files(tmp_path: Path) -> None:
    archive = tmp_path / "x.tar"
    archive.write_bytes(A + block("b.zip", content=ONE) + bytes(1024))
    unpack(archive, tmp_path / "out")
    assert found(tmp_path / "out") == {"images/a.jpg": b"one", "b.zip": ONE}


def test_a_large_table_of_contents_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = zipped(tmp_path / "x.zip", {f"{number}": b"" for number in range(30)})
    monkeypatch.setattr(module, "_DIRECTORY", 1000)
    with pytest.raises(DownloadError, match="its table of contents has"):
        unpack(archive, tmp_path / "out")
    monkeypatch.setattr(module, "_DIRECTORY", 1 << 20)
    monkeypatch.setattr(module, "MAX_FILES", 20)
    with pytest.raises(DownloadError, match="holds more than 20 files"):
        unpack(archive, tmp_path / "out")


@pytest.mark.parametrize("compress", [bytes, gzip.compress, bz2.compress, lzma.compress])
def test_honest_extensions_of_tar(compress: Callable[[bytes], bytes], tmp_path: Path) -> None:
    """Long names, extended headers, an unknown kind, a second stream."""
    long = "d/" * 20 + "x" * 200
    content = pax("comment=of git", b"g") + pax(f"path={long}") + block("x", content=b"two")
    rest = block(long + "y", content=bytes(70_000)) + block("v", kind=b"Z", content=b"three") + bytes(1024)
    archive = tmp_path / "x.tar"
    archive.write_bytes(compress(content) + compress(rest))
    assert unpack(archive, tmp_path / "out") == 3
    assert found(tmp_path / "out") == {long: b"two", long + "y": bytes(70_000), "v": b"three"}
