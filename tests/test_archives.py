"""Checkpoint archives: read without running anything in them, whatever they hold."""

import copyreg
import io
import pickle
import struct
import sys
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from maple.archives import read_checkpoint, read_torchscript
from maple.errors import CheckpointError, UnsafeCheckpointError
from maple.importers import import_checkpoint

HT, HALF = 512, torch.float16


def draw(*shape: int, dtype: torch.dtype = HALF) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * 0.02).to(dtype)


def archive(path: Path, pickled: bytes, records: dict[str, bytes] | None = None, **options: Any) -> Path:
    with zipfile.ZipFile(path, "w", **options) as file:
        file.writestr("archive/data.pkl", pickled)
        for name, data in (records or {}).items():
            file.writestr(name, data)
    return path


# ---- reading -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_values_of_every_type_come_back(tmp_path, protocol, zipped):
    base = torch.arange(24.0)
    tensors = {str(kind): torch.arange(7).to(kind) for kind in (HALF, torch.bfloat16, torch.float64, torch.int64)}
    tensors |= {"bool": torch.tensor([True, False]), "empty": torch.empty(0, 3), "scalar": torch.tensor(1.5)}
    tensors |= {"view": base.view(4, 6)[1:, ::2].t(), "base": base, "parameter": torch.nn.Parameter(base[3:5])}
    plain = {"n": [1, -(2**70), 0.5, None, True, "ü" * 300], "t": ((), (1,), (1, 2), (1, 2, 3, 4)), 3: torch.Size([2])}
    path = tmp_path / "file"
    torch.save({**tensors, **plain}, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    read = read_checkpoint(path)
    for key, value in tensors.items():
        assert read[key].dtype == value.dtype
        assert torch.equal(read[key], value)
        assert not read[key].requires_grad
    assert {key: read[key] for key in plain} == plain
    read["base"][6] = -1
    assert read["view"][0, 0] == -1


def test_tensors_of_a_gpu_come_to_the_cpu(tmp_path):
    torch.save({"ctx": draw(4, HT)}, tmp_path / "file")
    with zipfile.ZipFile(tmp_path / "file") as file:
        data = {name.partition("/")[2]: file.read(name) for name in file.namelist()}
    pickled = data["data.pkl"].replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")
    assert pickled != data["data.pkl"]
    path = archive(tmp_path / "gpu", pickled, {"archive/data/0": data["data/0"]})
    assert torch.equal(read_checkpoint(path)["ctx"], draw(4, HT))


def legacy(path: Path, pickled: bytes, keys: list[str], storages: bytes, little: bool = True) -> Path:
    header = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": little}]
    path.write_bytes(b"".join(pickle.dumps(part, 2) for part in header) + pickled + pickle.dumps(keys, 2) + storages)
    return path


def test_the_storage_views_of_old_torch_are_read(tmp_path):
    """Before torch 1.6 a persistent id could name a part of a storage: (key, offset, size)."""
    numbers = struct.pack("<q6f", 6, *range(6))
    pickled = tensor(6, NUMBER[1], NUMBER[2] + b"\x85", NUMBER[1] + b"\x85")
    view = b"(" + text("part") + b"K\x02K%ct" + b"tQ"
    for size, expected in ((4, [3.0, 4.0]), (5, None)):
        part = pickled.replace(b"tQ", view.replace(b"%c", bytes([size])), 1)
        path = legacy(tmp_path / "file", part, ["0"], numbers)
        if expected is None:
            with pytest.raises(CheckpointError, match="beyond its storage of 6 numbers"):
                read_checkpoint(path)
        else:
            assert read_checkpoint(path)["ctx"].tolist() == expected
    with pytest.raises(CheckpointError, match="big-endian"):
        read_checkpoint(legacy(tmp_path / "file", pickled, ["0"], numbers, little=False))


# ---- malice --------------------------------------------------------------------------------------------------------


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def call(name: str, *args: bytes) -> bytes:
    return b"c" + name.replace(" ", "\n").encode() + b"\n(" + b"".join(args) + b"tR"


def payloads(sentinel: Path) -> dict[str, bytes]:
    touch, python = f"touch '{sentinel}'", f"open({str(sentinel)!r}, 'w').close()"
    module = call("importlib import_module", text("os"))
    state = b"(" + text("__setstate__") + call("builtins eval", text(python)) + b"d"
    return {
        "os.system": call("os system", text(touch)),
        "posix.system": call("posix system", text(touch)),
        "builtins.eval": call("builtins eval", text(python)),
        "builtins.exec": call("builtins exec", text(python)),
        "subprocess": call("subprocess run", b"(" + text("touch") + text(str(sentinel)) + b"l"),
        "getattr gadget": call("builtins getattr", module, text("system"))[:-2] + b"tR(" + text(touch) + b"tR",
        "nested names": b"\x80\x04" + text("os") + text("path.os.system") + b"\x93(" + text(touch) + b"tR",
        "INST": b"(" + text(touch) + b"ios\nsystem\n",
        "OBJ": b"(cos\nsystem\n" + text(touch) + b"o",
        "NEWOBJ": b"cmalicious_on_import\nThing\n)\x81",
        "NEWOBJ_EX": b"cmalicious_on_import\nThing\n)}\x92",
        "copyreg": call("copyreg _reconstructor", b"cmalicious_on_import\nThing\ncbuiltins\nobject\nN"),
        "BUILD": call("malicious_on_import Thing") + state + state + b"\x86b",
        "import": b"cmalicious_on_import\nThing\n",
        "torch.jit": call("torch.jit._serialization load", call("builtins eval", text(python))),
        "torch.load": call("torch.serialization load", call("builtins eval", text(python))),
        "extension": b"\x82\xf0(" + text(python) + b"tR",
    }


NAMES = list(payloads(Path("sentinel")))


@pytest.fixture
def malice(tmp_path, monkeypatch):
    """A sentinel that must not appear, a module that makes it on import, and `eval` as an extension code."""
    sentinel = tmp_path / "sentinel"
    source = f"open({str(sentinel)!r}, 'w').close()\nclass Thing:\n    __slots__ = ('a', '__dict__')\n"
    (tmp_path / "malicious_on_import.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    copyreg.add_extension("builtins", "eval", 0xF0)
    yield sentinel
    copyreg.remove_extension("builtins", "eval", 0xF0)
    copyreg.clear_extension_cache()
    sys.modules.pop("malicious_on_import", None)


@pytest.mark.parametrize("name", NAMES)
def test_the_payloads_are_live(malice, name):
    """The control: the standard unpickler does run each of them."""
    with io.BytesIO(payloads(malice)[name] + b".") as stream:
        try:
            value = pickle.load(stream)
        except Exception:  # noqa: BLE001  # what the foreign call returns may not suit; only the file counts
            value = None
    if hasattr(value, "wait"):
        value.wait()
    assert malice.exists()


@pytest.mark.parametrize("place", ["root", "optimizer", "state_dict", "tensor", "key", "legacy", "bare"])
@pytest.mark.parametrize("name", NAMES)
def test_a_malicious_pickle_executes_nothing(tmp_path, malice, name, place):
    payload = payloads(malice)[name]
    modules, path = set(sys.modules), tmp_path / "model.pth.tar-5"
    content = {"root": payload, "legacy": payload, "bare": payload, "key": b"}" + payload + b"K\x01s"}
    content |= {"optimizer": b"}(" + text("optimizer") + payload + text("epoch") + b"K\x05u"}
    content |= {"state_dict": b"}" + text("state_dict") + payload + b"s"}
    content |= {"tensor": b"}" + text("state_dict") + b"}" + text("ctx") + payload + b"ss"}
    pickled = b"\x80\x04" + content[place] + b"."
    if place == "legacy":
        torch.save({}, path, _use_new_zipfile_serialization=False)
        header, end, _ = path.read_bytes().partition(b"\x80\x02}q\x00.")
        assert end
        path.write_bytes(header + pickled)
    elif place == "bare":
        path.write_bytes(pickled)
    else:
        archive(path, pickled)
    if place in ("key", "optimizer"):
        assert isinstance(read_checkpoint(path), dict)
    else:
        with pytest.raises(CheckpointError if place == "bare" else UnsafeCheckpointError):
            import_checkpoint(path)
    with pytest.raises(CheckpointError):
        import_checkpoint(path)
    assert not malice.exists()
    assert set(sys.modules) == modules


def test_attributes_of_classes_are_not_set(tmp_path):
    before = dict(vars(CheckpointError))
    build = b"cmaple.errors\nCheckpointError\n}" + text("__str__") + b"K\x01s}" + text("hint") + b"K\x02s\x86b"
    read = read_checkpoint(archive(tmp_path / "file", b"\x80\x02}" + text("optimizer") + build + b"s."))
    assert read["optimizer"].origin == "maple.errors.CheckpointError"
    assert dict(vars(CheckpointError)) == before


# ---- damage --------------------------------------------------------------------------------------------------------

STORAGE = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K%ctQ"


def tensor(numel: int, offset: bytes, size: bytes, stride: bytes) -> bytes:
    rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE.replace(b"%c", bytes([numel]))
    return b"\x80\x02}" + text("ctx") + rebuild + offset + size + stride + b"\x89ccollections\nOrderedDict\n)RtRs."


NUMBER = {n: b"J" + struct.pack("<i", n) for n in (-1, 0, 1, 2, 3, 4, 5, 2**31 - 1)}
HUGE = b"\x8a\x09" + (2**65).to_bytes(9, "little")


@pytest.mark.parametrize(
    ("numel", "offset", "size", "stride"),
    [
        (4, NUMBER[1], NUMBER[4] + b"\x85", NUMBER[1] + b"\x85"),
        (4, NUMBER[0], NUMBER[5] + b"\x85", NUMBER[1] + b"\x85"),
        (4, NUMBER[0], NUMBER[3] + b"\x85", NUMBER[2] + b"\x85"),
        (4, NUMBER[-1], NUMBER[1] + b"\x85", NUMBER[1] + b"\x85"),
        (4, NUMBER[3], NUMBER[2] + b"\x85", NUMBER[-1] + b"\x85"),
        (4, NUMBER[0], NUMBER[-1] + b"\x85", NUMBER[1] + b"\x85"),
        (4, NUMBER[0], NUMBER[2**31 - 1] + b"\x85", NUMBER[0] + b"\x85"),
        (4, NUMBER[0], HUGE + b"\x85", NUMBER[0] + b"\x85"),
        (4, NUMBER[0], NUMBER[0] + HUGE + b"\x86", NUMBER[1] + NUMBER[1] + b"\x86"),
        (4, NUMBER[0], NUMBER[4] + b"\x85", b")"),
        (4, b"\x88", NUMBER[1] + b"\x85", NUMBER[1] + b"\x85"),
        (5, NUMBER[0], NUMBER[4] + b"\x85", NUMBER[1] + b"\x85"),
        (200, NUMBER[0], NUMBER[4] + b"\x85", NUMBER[1] + b"\x85"),
    ],
)
def test_a_tensor_outside_its_storage_is_refused(tmp_path, numel, offset, size, stride):
    path = archive(tmp_path / "file", tensor(numel, offset, size, stride), {"archive/data/0": bytes(16)})
    with pytest.raises(CheckpointError, match=r"storage"):
        read_checkpoint(path)
    good = tensor(4, NUMBER[0], NUMBER[4] + b"\x85", NUMBER[1] + b"\x85")
    assert read_checkpoint(archive(path, good, {"archive/data/0": bytes(16)}))["ctx"].tolist() == [0.0] * 4


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        (b"\x80\x02}K\x01\x85" + b"\x85" * 200_000 + b"K\x01s.", "dictionary key a tuple"),
        (b"\x80\x02}K\x01K\x01\x86" + b"2\x86" * 90 + b"K\x01s.", "dictionary key a tuple"),
        (b"\x80\x02}K\x01" + b"]" * 200_000 + b"a" * 199_999 + b"s.", "nest deeper"),
        (b"\x80\x02}q\x00K\x01h\x00s.", "contain themselves"),
        (b"\x80\x02}h\x07.", "memo entry 7"),
        (b"\x80\x02}K\x01s", "empty stack"),
        (b"\x80\x02}(", "ValueError"),
        (b"\x80\x02}K\x01X\xff\xff\xff\x7fs.", "ValueError"),
        (b"\x80\x05}K\x01\x96" + b"\xff" * 7 + b"\x00s.", "ValueError"),
        (b"\x80\x09}.", "protocol 9"),
        (b"\x80\x05\x97.", "NEXT_BUFFER"),
        (b"\x80\x02K\x01.", "holds a value of type int"),
        (b"\x80\x02K\x01)R.", "a class is needed"),
        (b"\x80\x02}K\x01u.", "never opened"),
        (b"\x80\x02(K\x01t(K\x01e.", "only lists grow"),
        (b"\x80\x02}(K\x01u.", "without a value"),
        (b"\x80\x02Pabc\n.", "PERSID"),
        (b"\x80\x02K\x01Q.", "persistent id 1"),
        (b"\x80\x02}K\x01r\xff\xff\xff\xffK\x02s.", None),
    ],
)
def test_a_hostile_pickle_is_refused_or_harmless(tmp_path, pickled, message):
    path = archive(tmp_path / "file", pickled)
    if message is None:
        assert read_checkpoint(path) == {1: 2}
    else:
        with pytest.raises(CheckpointError, match=message):
            read_checkpoint(path)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["../outside"], "no torch checkpoint has"),
        (["/etc/outside"], "no torch checkpoint has"),
        (["archive\\..\\outside"], "no torch checkpoint has"),
        (["other/data.pkl"], "this one has 2"),
        (["archive/constants.pkl"], "TorchScript"),
        (["archive/byteorder"], "big-endian"),
    ],
)
def test_other_archives_are_refused(tmp_path, names, message):
    path = archive(tmp_path / "file", b"\x80\x02}.", dict.fromkeys(names, b"big"))
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(path)
    assert sorted(tmp_path.iterdir()) == [path]


def script_object(*attributes: tuple[str, bytes]) -> bytes:
    return b"c__torch__\nModule\n)\x81}(" + b"".join(text(name) + value for name, value in attributes) + b"ub"


def test_a_torchscript_archive_gives_its_tensors(tmp_path, malice):
    numbers = tensor(4, NUMBER[0], NUMBER[4] + b"\x85", NUMBER[1] + b"\x85").removeprefix(b"\x80\x02}" + text("ctx"))[
        :-2
    ]
    inner = script_object(("weight", numbers), ("training", b"\x88"))
    root = script_object(("block", inner), ("payload", payloads(malice)["builtins.eval"]))
    records = {"archive/constants.pkl": b"\x80\x02).", "archive/data/0": struct.pack("<4f", 1, 2, 3, 4)}
    path = archive(tmp_path / "file", b"\x80\x02" + root + b".", records)
    state = read_torchscript(path)
    assert {name: value.tolist() for name, value in state.items()} == {"block.weight": [1, 2, 3, 4]}
    assert not malice.exists()
    with pytest.raises(CheckpointError, match="is a TorchScript program, not a checkpoint"):
        read_checkpoint(path)
    with pytest.raises(CheckpointError, match="is a checkpoint, not a TorchScript program"):
        read_torchscript(archive(path, b"\x80\x02}."))


def test_modules_that_share_modules_are_followed_so_far(tmp_path):
    """Forty modules that each contain the one before twice: a tree of 2^40."""
    pickled = script_object(("a", b"K\x01")) + b"q\x00"
    for number in range(1, 41):
        shared = b"h" + bytes([number - 1])
        pickled += script_object(("a", shared), ("b", shared)) + b"q" + bytes([number])
    path = archive(tmp_path / "file", b"\x80\x02" + pickled + b".", {"archive/constants.pkl": b""})
    with pytest.raises(CheckpointError, match="more than 100,000 attributes"):
        read_torchscript(path)


def test_files_of_other_kinds_are_refused(tmp_path):
    path = archive(tmp_path / "file", b"\x80\x02}.", compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="compressed"):
        read_checkpoint(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("notes.txt", "hello")
    with pytest.raises(CheckpointError, match=r"one NAME/data\.pkl, this one has 0"):
        read_checkpoint(path)
    for data, message in (
        (b"", "empty"),
        (b"hello", "not a torch checkpoint"),
        (pickle.dumps({}), "not one written by"),
    ):
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=message):
            read_checkpoint(path)
    for other in (tmp_path / "absent", tmp_path):
        with pytest.raises(CheckpointError, match="cannot be read"):
            read_checkpoint(other)
    torch.save({"epoch": 3}, path)
    with pytest.raises(CheckpointError, match="no state_dict, only the keys: 'epoch'"):
        import_checkpoint(path)


def sample(zipped: bool) -> bytes:
    with io.BytesIO() as stream:
        state = {"ctx": draw(2, 8), "token_prefix": draw(2, 1, 8)}
        content = {"state_dict": state, "epoch": 5, "optimizer": {"lr": [0.1, (1, 2)]}, "scheduler": Path("x")}
        torch.save(content, stream, _use_new_zipfile_serialization=zipped)
        return stream.getvalue()


SAMPLES = {zipped: sample(zipped) for zipped in (True, False)}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_file_cut_short_is_never_read(tmp_path, zipped):
    path, data = tmp_path / "file", SAMPLES[zipped]
    for kept in {*range(0, len(data), 7), len(data) - 1}:
        path.write_bytes(data[:kept])
        with pytest.raises(CheckpointError):
            read_checkpoint(path)


FUZZ = settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
EDITS = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255), st.integers(0, 2)), min_size=1, max_size=4
)


def mutate(data: bytes, edits: list[tuple[float, int, int]], kept: float) -> bytes:
    edited = bytearray(data)
    for place, value, kind in edits:
        at = int(place * len(edited))
        edited[at : at + (kind < 2)] = bytes([value]) if kind else b""
    return bytes(edited[: max(1, int(kept * len(edited)))])


def read_or_refuse(path: Path) -> None:
    with suppress(CheckpointError):
        assert isinstance(read_checkpoint(path), dict)
        import_checkpoint(path)


@FUZZ
@given(zipped=st.booleans(), edits=EDITS, kept=st.one_of(st.just(1.0), st.floats(0, 1)))
def test_damaged_files_raise_only_checkpoint_errors(tmp_path, zipped, edits, kept):
    path = tmp_path / "file"
    path.write_bytes(mutate(SAMPLES[zipped], edits, kept))
    read_or_refuse(path)


@FUZZ
@given(edits=EDITS, noise=st.one_of(st.none(), st.binary(max_size=40)))
@example(edits=[(0.0, 128, 1)], noise=b"")
def test_damaged_pickles_raise_only_checkpoint_errors(tmp_path, edits, noise):
    """Behind a correct checksum, where the archive does not already catch the damage."""
    with zipfile.ZipFile(io.BytesIO(SAMPLES[True])) as file:
        records = {name: file.read(name) for name in file.namelist()}
    (name,) = [name for name in records if name.endswith("/data.pkl")]
    records[name] = mutate(records[name], edits, 1.0) if noise is None else b"\x80\x02" + noise + b"."
    with zipfile.ZipFile(tmp_path / "file", "w") as file:
        for record, data in records.items():
            file.writestr(record, data)
    read_or_refuse(tmp_path / "file")
