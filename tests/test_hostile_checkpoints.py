"""Hostile checkpoints of both kinds, by every way in: nothing runs, and each is refused in little time and memory."""

import pickle
import resource
import struct
import sys
import time
import zipfile
from pathlib import Path

import pytest
from test_archives import STORAGE, legacy, malice, payloads, tensor, text

from maple import load_clip
from maple.errors import MapleError
from maple.importers import import_checkpoint

__all__ = ["malice"]  # the fixture: a sentinel that must not appear

NAMES = list(payloads(Path("sentinel")))
KINDS = ("zip", "torchscript", "legacy", "bare", "protocol 0", "code")
LONG = 600_000  # instructions; more than any checkpoint has
HUGE = b"\x8a\x08" + (2**61).to_bytes(8, "little")


def number(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def view(numel: int, offset: bytes, size: bytes, stride: bytes) -> bytes:
    return tensor(numel, offset, size, stride)[2:-1]


SHAPES: dict[str, bytes] = {
    "lists": b"]" * LONG,
    "dictionaries": b"}" * LONG,
    "marks": b"(" * LONG,
    "sets": b"\x8f" * LONG,
    "memo": b"}" + b"".join(b"r" + struct.pack("<I", index) for index in range(LONG)),
    "copies": b"}" + b"2" * LONG,
    "globals": b"ca\nb\n" * LONG,
    "nested": b"}K\x01" + b"]" * 200_000 + b"a" * 199_999 + b"s",
    "nested tuples": b"}" + text("a") + b"K\x01\x85" + b"\x85" * 200_000 + b"s",
    "shared tuples": b"}" + text("a") + b"K\x01K\x01\x86" + b"2\x86" * 90 + b"s",
    "itself": b"}q\x00" + text("a") + b"h\x00s",
    "long number": b"}" + text("a") + b"L" + b"9" * 1_000_000 + b"L\ns",
    "storage larger than the file": view(255, number(0), number(255) + b"\x85", number(1) + b"\x85"),
    "storage of terabytes": view(4, number(0), HUGE + b"\x85", number(1) + b"\x85"),
    "expanded": view(4, number(0), number(2**31 - 1) * 2 + b"\x86", number(0) * 2 + b"\x86"),
    "empty but wide": view(4, number(0), number(0) + HUGE + b"\x86", number(1) * 2 + b"\x86"),
    "negative stride": view(4, number(3), number(4) + b"\x85", number(-1) + b"\x85"),
    "no storage": view(4, number(0), number(4) + b"\x85", number(1) + b"\x85").replace(text("0"), text("7")),
    "other kind": view(4, number(0), number(4) + b"\x85", number(1) + b"\x85").replace(b"FloatStorage", b"EvilStorage"),
    "module": b"}" + text("a") + b"(" + text("module") + b"cos\nsystem\n" + text("x") + text("y") + b"tQs",
    "persistent text": b"Pcos.system\n",
    "no end": b"}" + text("a") + STORAGE[:9],
}


def write(path: Path, kind: str, content: bytes, sentinel: Path) -> Path:
    """Write a pickle's instructions as a file of one of KINDS."""
    pickled = b"\x80\x04" + content + b"."
    code = f"def forward(self):\n  ops.aten.save(self, {str(sentinel)!r})\n  while True: pass\n".encode()
    if kind == "bare":
        path.write_bytes(pickled)
    elif kind == "legacy":
        legacy(path, pickled, ["0"], struct.pack("<q", 4) + bytes(16))
    else:
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("archive/data.pkl", content + b"." if kind == "protocol 0" else pickled)
            file.writestr("archive/data/0", bytes(16))
            if kind in ("torchscript", "code"):
                file.writestr("archive/constants.pkl", pickled if kind == "code" else pickle.dumps(()))
                file.writestr("archive/code/__torch__/evil.py", code)
                file.writestr("archive/code/__torch__/evil.py.debug_pkl", pickled)
    return path


def refused(path: Path, sentinel: Path, most: int = 5) -> None:
    """Open a file in every way that a user can; each must end in a MapleError, within seconds and without effects."""
    folders = {"m": ("open_clip_config.json", "open_clip_pytorch_model.bin"), "t": ("config.json", "pytorch_model.bin")}
    ways = [lambda: load_clip(str(path)), lambda: load_clip("RN50", str(path)), lambda: import_checkpoint(path)]
    for name, (config, weights) in folders.items():
        folder = path.parent / name
        folder.mkdir()
        small = '{"model_cfg": {"embed_dim": 64, "vision_cfg": {}, "text_cfg": {}}, "model_type": "clip"}'
        (folder / config).write_text(small)
        (folder / weights).symlink_to(path)
        ways.append(lambda folder=folder: load_clip(str(folder)))
    before, modules = set(path.parent.rglob("*")), set(sys.modules)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for way in ways[:most]:
        began = time.process_time()
        with pytest.raises(MapleError) as caught:
            way()
        assert len(str(caught.value)) < 2000
        assert time.process_time() - began < 30  # a second or two on a machine that is not busy
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 1_000_000
    assert not sentinel.exists()
    assert set(path.parent.rglob("*")) == before
    assert not [name for name in set(sys.modules) - modules if "malicious" in name]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_code(tmp_path: Path, malice: Path, name: str, kind: str) -> None:
    payload = payloads(malice)[name]
    content = payload if kind == "bare" else b"}" + text("state_dict") + b"}" + text("a") + payload + b"ss"
    refused(write(tmp_path / "w.pt", kind, content, malice), malice)


@pytest.mark.parametrize("kind", ["zip", "torchscript", "legacy"])
@pytest.mark.parametrize("name", SHAPES)
def test_shapes(tmp_path: Path, name: str, kind: str) -> None:
    refused(
        write(tmp_path / "w.pt", kind, SHAPES[name], tmp_path / "sentinel"),
        tmp_path / "sentinel",
        1 if len(SHAPES[name]) > 10_000 else 5,
    )


def many_records(path: Path) -> None:
    with zipfile.ZipFile(path, "w", compresslevel=0) as file:
        for index in range(60_000):
            file.writestr(f"a/{index}", b"")


def overlapping(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/data.pkl", b"\x80\x02}.")
        file.writestr("a/data/0", bytes(1000))
        for info in file.filelist[1:]:
            info.file_size = info.compress_size = 2**33


def compressed(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a/data.pkl", b"\x80\x02" + bytes(50_000_000))


def directory_elsewhere(path: Path) -> None:
    overlapping(path)
    content = path.read_bytes()
    end = content.rindex(b"PK\5\6")
    path.write_bytes(content[: end + 12] + struct.pack("<LL", 2**31, 0) + b"\0\0")


def outside(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/data.pkl", b"\x80\x02}.")
        file.writestr("../../outside", b"x")


def nested_folders(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/" * 20_000 + "data.pkl", b"\x80\x02}.")


@pytest.mark.parametrize("make", [many_records, overlapping, compressed, directory_elsewhere, outside, nested_folders])
def test_archives(tmp_path: Path, make) -> None:
    make(tmp_path / "w.pt")
    refused(tmp_path / "w.pt", tmp_path / "sentinel")
