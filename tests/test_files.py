"""Reading JSON: what is missing, damaged or of another kind is reported with the path and the advice."""

import errno
import io
import os
import signal
import socket
import stat
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import ForkedProcess

from maple import files
from maple.archives import read_checkpoint, read_torchscript
from maple.checkpoint import read_prompts, write_tensors
from maple.clip.checkpoints.formats import read_tensors
from maple.data.published.download import check_file
from maple.data.published.split_files import read_lines
from maple.data.published.unpack import unpack
from maple.errors import CheckpointError, DataError, MapleError, shortened_list
from maple.files import read_json, read_json_lines, replacing, temporary_path, write_text


def test_json_is_read_as_the_kind_that_is_expected(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a": [1]}')
    assert read_json(path) == {"a": [1]}
    with pytest.raises(DataError, match=r"a\.json is damaged: it should hold a JSON array, but holds {.*}; fix it$"):
        read_json(path, list, error=DataError, advice="fix it")


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[" * 100_000, b""])
def test_damaged_json_is_reported_with_advice(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a\.json is unreadable or damaged \(.*\); write it again$"):
        read_json(path, advice="write it again")


def test_missing_json_is_reported_as_the_caller_wants_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.json does not exist; train first$"):
        read_json(tmp_path / "a.json", error=DataError, advice="train first")
    with pytest.raises(CheckpointError, match=r"^not a run$"):
        read_json(tmp_path / "a.json", missing="not a run")
    with pytest.raises(CheckpointError, match="unreadable"):
        read_json(tmp_path)


def test_json_lines_are_numbered_and_damaged_ones_raise_or_are_collected(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    assert read_json_lines(path) == {}
    path.write_text('{"a": "x\u2028y"}\n\n[1]\n{"b"\n{"c": 2}\n', encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"a\.jsonl is damaged: line 3 is not a JSON object; move it away$"):
        read_json_lines(path, advice="move it away")
    problems: dict[int, str] = {}
    objects = read_json_lines(path, on_damage=problems.__setitem__)
    assert objects == {1: {"a": "x\u2028y"}, 5: {"c": 2}}
    assert problems.keys() == {3, 4}
    assert problems[3] == "not a JSON object"
    assert problems[4].startswith("not JSON: ")


def test_lists_are_shortened_for_messages() -> None:
    assert shortened_list(["a", "b"]) == "a, b"
    assert shortened_list(range(1234), 2, separator="; ") == "0; 1 and 1,232 more"
    assert shortened_list(["x" * 100], longest=11) == "xxxx...xxxx"


def write_until_killed(folder: Path) -> None:
    with temporary_path(folder, folder=True) as path:
        (path / "model.onnx").touch()
        with replacing(folder / "rows.jsonl") as path:
            path.write_text("half")
            os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
            write_tensors(folder / "prompts.safetensors", {"a": torch.zeros(1)}, {})


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_temporary_files_of_killed_processes_are_removed_by_the_next_writer(tmp_path: Path) -> None:
    own = {".tmpAbCdEf", ".maple-notes.tmp", ".rows.jsonl.abcdefgh.tmp", "a.tmp", ".maple-ABCDEFGH.tmp"}
    for name in own:
        (tmp_path / name).touch()
    assert ForkedProcess(write_until_killed, tmp_path).wait() == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == len(own) + 3
    with temporary_path(tmp_path) as file, temporary_path(tmp_path, folder=True) as folder:
        write_text(tmp_path / "other.txt", "")
        assert {path.name for path in tmp_path.iterdir()} == {*own, "other.txt", file.name, folder.name}, "in use"
    write_text(tmp_path / "other.txt", "")
    assert {path.name for path in tmp_path.iterdir()} == {*own, "other.txt"}


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UnicodeEncodeError), replacing(tmp_path / ("a" * 255)) as path:
        path.write_text("half, and then \ud800", encoding="utf-8")
    assert list(tmp_path.iterdir()) == []
    write_text(tmp_path / ("a" * 255), "the longest name there can be")


@pytest.mark.parametrize("reason", [errno.EINVAL, errno.EOPNOTSUPP])
def test_files_are_written_where_permissions_and_flushes_of_folders_are_refused(
    reason: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flush = os.fsync

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    def flush_files(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(reason, os.strerror(reason))
        flush(descriptor)

    monkeypatch.setattr(Path, "chmod", refuse)
    monkeypatch.setattr(os, "fsync", flush_files)
    write_text(tmp_path / "a.txt", "whole")
    assert (tmp_path / "a.txt").read_text() == "whole"


def test_a_disk_that_fails_to_flush_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        write_text(tmp_path / "a.txt", "whole")
    assert list(tmp_path.iterdir()) == []


def _special(folder: Path) -> dict[str, Path]:
    """A pipe, a socket, and devices behind links, by the words of the message."""
    os.mkfifo(folder / "pipe")
    connection = socket.socket(socket.AF_UNIX)
    here = Path.cwd()
    os.chdir(folder)  # the path of a socket is limited to a hundred characters
    connection.bind("socket")
    connection.close()
    os.chdir(here)
    (folder / "zeros").symlink_to("/dev/zero")
    return {"it is a pipe": folder / "pipe", "it is a socket": folder / "socket", "it is a device": folder / "zeros"}


READERS: dict[str, Callable[[Path], object]] = {
    "JSON": files.read_json,
    "JSON lines": files.read_json_lines,
    "arrays": files.read_arrays,
    "prompts": read_prompts,
    "weights of torch": read_checkpoint,
    "TorchScript": read_torchscript,
    "CLIP": read_tensors,
    "lines of a split": lambda path: list(read_lines(path)),
    "an archive": lambda path: unpack(path, path.parent / "unpacked"),
    "a download": lambda path: check_file(path, checksum="md5:0", size=None),
}


@pytest.mark.skipif(sys.platform == "win32", reason="no such files there")
@pytest.mark.parametrize("name", READERS)
def test_pipes_sockets_and_devices_are_refused_at_once(name: str, tmp_path: Path) -> None:
    for words, path in _special(tmp_path).items():
        with pytest.raises((MapleError, OSError), match=words):
            READERS[name](path)
        if name == "CLIP":
            path = path.rename(path.with_suffix(".safetensors"))
            with pytest.raises(MapleError, match=words):
                READERS[name](path)


def _npz(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def _npy(shape: str, dtype: str = "'<f4'", size: int = 0) -> bytes:
    header = f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(size)


def _zipped(content: bytes, name: str = "a.npy") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return buffer.getvalue()


def test_arrays_are_read_as_by_numpy(tmp_path: Path) -> None:
    arrays = {
        "words": np.array(["ä.png", "b"]),
        "half": np.arange(6, dtype=np.float16).reshape(2, 3),
        "columns": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "big": np.arange(3, dtype=">i4"),
        "none": np.zeros((0, 4), np.float32),
        "scalar": np.array(True),
    }
    (tmp_path / "a.npz").write_bytes(_npz(**arrays))
    found = files.read_arrays(tmp_path / "a.npz", "biufU")
    assert list(found) == list(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype
    np.save(tmp_path / "a.npy", arrays["half"])
    np.testing.assert_array_equal(files.read_arrays(tmp_path / "a.npy")[""], arrays["half"])


HOSTILE_ARRAYS = {
    "1e12 values": (_npy("(1000000, 1000000)"), "does not have its shape"),
    "more than 64 bits": (_npy(f"({10**40},)"), "does not have its shape"),
    "below 0": (_npy("(-2, -2)", size=16), "does not have its shape"),
    "fewer values": (_npy("(4,)", size=12), "does not have its shape"),
    "objects": (_npy("(1,)", "'|O'", 8), "holds object"),
    "records of 1 GB": (_npy("(1,)", "'|V999999999'"), "holds"),
    "words": (_npy("(1,)", "'<U4'", 16), "holds <U4"),
    "no type": (_npy("(1,)", "'evil'"), "not a valid dtype"),
    "no header": (b"\x93NUMPY\x01\x00\xff\xff{", "EOF|header"),
    "nothing": (b"", "EOF|magic"),
    "text": (b"<html>", "magic"),
    "zipped: 1e12 values": (_zipped(_npy("(1000000, 1000000)")), "does not have its shape"),
    "zipped: an object": (_zipped(_npy("(1,)", "'|O'", 8)), "holds object"),
    "zipped: text": (_zipped(b"abcdefghij"), "magic"),
    "a damaged zip": (_npz(a=np.arange(1000))[:-30], "not a zip file|End"),
    "damaged content": (_npz(a=np.arange(1000)).replace(b"a.npy", b"b.npy", 1), "differ"),
}


@pytest.mark.parametrize("name", HOSTILE_ARRAYS)
def test_hostile_arrays_are_refused(name: str, tmp_path: Path) -> None:
    content, message = HOSTILE_ARRAYS[name]
    (tmp_path / "arrays").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        files.read_arrays(tmp_path / "arrays")


def test_files_beyond_the_limits_are_not_read(tmp_path: Path) -> None:
    for name, size in (("a.json", 2**30), ("a.npz", 2**32)):
        with (tmp_path / name).open("wb") as file:
            file.truncate(size)
    with pytest.raises(CheckpointError, match="1,073,741,824 bytes, more than the allowed"):
        files.read_json(tmp_path / "a.json")
    with pytest.raises(OSError, match="more than the allowed"):
        files.read_arrays(tmp_path / "a.npz")
    content = bytearray(_zipped(bytes(10)))
    place = content.index(b"PK\1\2")
    content[place + 24 : place + 28] = (2**32 - 2).to_bytes(4, "little")
    (tmp_path / "b.npz").write_bytes(content)
    with pytest.raises(ValueError, match="more than the allowed 2,147,483,648 bytes"):
        files.read_arrays(tmp_path / "b.npz")
