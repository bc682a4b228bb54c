"""Published checkpoints: read without running them, and converted without loss."""

import copyreg
import io
import os
import pickle
import struct
import sys
import types
import zipfile
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from maple.archives import Placeholder, read_checkpoint, read_torchscript
from maple.checkpoint import put_parameters
from maple.errors import CheckpointError, ConfigError, MapleError, UnsafeCheckpointError
from maple.importers import import_checkpoint
from maple.importers.convert import convert
from maple.methods import build_method

HT, HV, D, LAYERS, CLASSES = 512, 768, 512, 12, 5
HALF = torch.float16
FOREIGN = "dassl_that_is_not_installed"


def draw(*shape: int, dtype: torch.dtype = HALF) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * 0.02).to(dtype)


def frozen() -> dict[str, torch.Tensor]:
    keys = [
        f"{side}.transformer.resblocks.{k}.ln_1.weight" for side in ("image_encoder", "text_encoder") for k in (0, 11)
    ]
    keys += ["image_encoder.conv1.weight", "image_encoder.class_embedding", "image_encoder.positional_embedding"]
    keys += ["image_encoder.ln_pre.bias", "image_encoder.ln_post.weight", "image_encoder.proj", "logit_scale"]
    keys += ["text_encoder.positional_embedding", "text_encoder.ln_final.weight", "text_encoder.text_projection"]
    keys += [f"text_encoder.transformer.resblocks.0.{name}" for name in ("attn.in_proj_weight", "mlp.c_fc.bias")]
    keys += ["image_encoder.transformer.resblocks.3.attn.out_proj.weight"]
    return {key: draw(3) for key in keys}


def tokens(length: int, prefix: str = "prompt_learner.") -> dict[str, torch.Tensor]:
    """Views of one storage, as the reference's buffers are."""
    embedding = draw(CLASSES, 77, HT)
    return {f"{prefix}token_prefix": embedding[:, :1], f"{prefix}token_suffix": embedding[:, 1 + length :]}


def maple(length: int = 2, depth: int = 9) -> dict[str, torch.Tensor]:
    learned = {"ctx": draw(length, HT), "proj.weight": draw(HV, HT), "proj.bias": draw(HV)}
    for k in range(depth - 1):
        learned[f"compound_prompts_text.{k}"] = draw(length, HT, dtype=torch.float32) + k
        learned[f"compound_prompt_projections.{k}.weight"] = draw(HV, HT, dtype=torch.float32) - k
        learned[f"compound_prompt_projections.{k}.bias"] = draw(HV, dtype=torch.float32)
    return {f"prompt_learner.{key}": value for key, value in learned.items()} | tokens(length) | frozen()


def ivlp(text: int = 2, vision: int = 2, text_depth: int = 12, vision_depth: int = 12) -> dict[str, torch.Tensor]:
    state = {"prompt_learner.ctx": draw(text, HT), **tokens(text)} if text else {}
    if vision_depth:
        state["image_encoder.VPT"] = draw(vision, HV, dtype=torch.float32)
    for side, width, length, depth in (("text", HT, text, text_depth), ("image", HV, vision, vision_depth)):
        for k in range(1, depth):
            state[f"{side}_encoder.transformer.resblocks.{k}.VPT_shallow"] = draw(length, width) + k
    return state | frozen()


def coop(length: int = 16, classes: int = 0) -> dict[str, torch.Tensor]:
    context = draw(classes, length, HT) if classes else draw(length, HT)
    return {"ctx": context, **tokens(length, "")}


def cocoop(hidden: int = D // 16) -> dict[str, torch.Tensor]:
    meta = {"linear1.weight": draw(hidden, D), "linear1.bias": draw(hidden)}
    meta |= {"linear2.weight": draw(HT, hidden), "linear2.bias": draw(HT)}
    return {"ctx": draw(4, HT), **tokens(4, ""), **{f"meta_net.{key}": value for key, value in meta.items()}}


def kgcoop() -> dict[str, torch.Tensor]:
    """Its prompt learner, with the two parts that nothing uses."""
    unused = {"bias_vectors": draw(1, D), "meta_net.linear1.weight": draw(D, D), "meta_net.linear1.bias": draw(D)}
    return {"ctx": draw(4, HT), **unused, **tokens(4, "")}


def promptsrc(depth: int = 9) -> dict[str, torch.Tensor]:
    """Its whole model: IVLP's, and the frozen image tower that its prompt learner keeps."""
    teacher = {f"prompt_learner.ZS_{key}": value for key, value in frozen().items() if key.startswith("image")}
    return ivlp(4, 4, depth, depth) | teacher


ALL = {"maple": maple, "independent_vl": ivlp, "deep_language": lambda: ivlp(4, vision_depth=0)}
ALL |= {"vpt": lambda: ivlp(0, 8, 0), "coop": coop, "cocoop": cocoop}
ALL |= {"kgcoop": kgcoop, "prograd": coop, "promptsrc": promptsrc}


def save_as_dassl(path: Path, state: dict[str, torch.Tensor], *, zipped: bool = True, val_result: Any = None) -> Path:
    """Write what Dassl's `save_model` writes: its warm-up scheduler carries a live scheduler and optimizer."""
    parameters = [torch.nn.Parameter(value.clone()) for value in state.values() if value.is_floating_point()]
    optimizer = torch.optim.SGD(parameters, lr=0.0035, momentum=0.9)
    for parameter in parameters[:2]:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    successor = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5.0)
    module = types.ModuleType(FOREIGN)
    cls = type("LiveThing", (), {"__module__": FOREIGN, "__setstate__": lambda *_: pytest.fail("ran foreign code")})
    live = cls()
    live.successor, live.optimizer, live.tags = successor, optimizer, {"a", "b"}
    module.LiveThing = cls
    content = OrderedDict(state)
    content._metadata = OrderedDict({"": {"version": 1}})
    scheduler = {"successor": successor, "warmup_epoch": 1, "live": live, "base_lrs": [0.0035], "array": np.ones(3)}
    checkpoint = {"state_dict": content, "epoch": 5, "optimizer": optimizer.state_dict(), "scheduler": scheduler}
    sys.modules[FOREIGN] = module
    try:
        torch.save({**checkpoint, "val_result": val_result}, path, _use_new_zipfile_serialization=zipped)
    finally:
        del sys.modules[FOREIGN]
    return path


def archive(path: Path, pickled: bytes, records: dict[str, bytes] | None = None, **options: Any) -> Path:
    with zipfile.ZipFile(path, "w", **options) as file:
        file.writestr("archive/data.pkl", pickled)
        for name, data in (records or {}).items():
            file.writestr(name, data)
    return path


# ---- reading -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("method", ALL)
def test_a_checkpoint_with_live_objects_is_read_and_converted(tmp_path, method, zipped):
    state = ALL[method]()
    path = save_as_dassl(tmp_path / "model.pth.tar-5", state, zipped=zipped, val_result=81.25)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    modules = set(sys.modules)
    read = read_checkpoint(path)
    assert list(read) == ["state_dict", "epoch", "optimizer", "scheduler", "val_result"]
    for key, value in state.items():
        assert read["state_dict"][key].dtype == value.dtype
        assert torch.equal(read["state_dict"][key], value)
    assert read["optimizer"]["param_groups"][0]["lr"] == 0.0035
    assert isinstance(read["optimizer"]["state"][0]["momentum_buffer"], torch.Tensor)
    assert read["scheduler"]["live"].origin == f"{FOREIGN}.LiveThing"
    assert isinstance(read["scheduler"]["successor"], Placeholder)
    assert read["scheduler"]["base_lrs"] == [0.0035]
    imported = import_checkpoint(path, method=method)
    assert set(sys.modules) == modules
    assert imported.method == method
    assert (imported.info["epoch"], imported.info["val_result"]) == (5, 81.25)
    assert f"{FOREIGN}.LiveThing" in imported.info["ignored_objects"]
    for value in imported.parameters.values():
        assert value.dtype == torch.float32
        assert value.is_contiguous()
        assert value.untyped_storage().nbytes() == 4 * value.numel()
    for name, value in convert(state, method=method).parameters.items():
        assert torch.equal(imported.parameters[name], value)


@pytest.mark.parametrize("method", ALL)
def test_a_converted_checkpoint_is_a_method_with_its_parameters(method, vit_b16):
    got = convert(ALL[method](), method=method)
    built = build_method({"name": got.method, **got.config}, vit_b16, ["cat", "dog"])
    put_parameters(built, got.parameters, source="test")
    assert built.prompt_parameters().keys() == got.parameters.keys()


def test_a_numpy_result_is_left_out(tmp_path):
    path = save_as_dassl(tmp_path / "model.pth.tar-5", coop(), val_result=np.float64(0.5))
    assert isinstance(read_checkpoint(path)["val_result"], Placeholder)
    assert "val_result" not in import_checkpoint(path).info


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


# ---- converting ----------------------------------------------------------------------------------------------------


def test_maple():
    state = maple(2, 9)
    got = convert(state)
    assert got.method == "maple"
    words = "a photo of a"
    assert got.config == {"prompt_length": 2, "prompt_depth": 9, "init_text": words, "coupling_sharing": "per_layer"}
    assert sum(value.numel() for value in got.parameters.values()) == 3_555_072
    assert torch.equal(got.parameters["text_prompt.0"], state["prompt_learner.ctx"].float())
    assert torch.equal(got.parameters["text_prompt.8"], state["prompt_learner.compound_prompts_text.7"])
    assert torch.equal(got.parameters["coupling.0.bias"], state["prompt_learner.proj.bias"].float())
    deep = state["prompt_learner.compound_prompt_projections.7.weight"]
    assert torch.equal(got.parameters["coupling.8.weight"], deep)
    assert got.info == {
        "text_width": HT, "vision_width": HV, "dropped_keys": len(frozen()) + 2, "dtypes": ["float16", "float32"],
        "class_count": CLASSES,
    }  # fmt: skip
    assert convert(maple(2, 1)).config["prompt_depth"] == 1
    assert convert(maple(8, 3)).config["init_text"] == ""


def test_independent_prompts_and_their_halves():
    got = convert(ivlp(2, 3, 12, 5))
    assert got.config == {
        "text_prompt_length": 2, "vision_prompt_length": 3, "text_prompt_depth": 12, "vision_prompt_depth": 5,
        "init_text": "a photo of a",
    }  # fmt: skip
    assert sum(value.numel() for value in convert(ivlp()).parameters.values()) == 30_720
    assert torch.equal(got.parameters["vision_prompt.0"], ivlp(2, 3)["image_encoder.VPT"])
    assert got.parameters["text_prompt.11"].mean() > 10
    language = convert(ivlp(4, vision_depth=0), init_text="a_photo_of_a")
    assert language.config == {"prompt_length": 4, "prompt_depth": 12, "init_text": "a photo of a"}
    assert sum(value.numel() for value in language.parameters.values()) == 24_576
    assert language.info["vision_width"] is None
    vision = convert(ivlp(0, 8, 0))
    words = "a photo of a {}."
    assert vision.config == {"vision_prompt_length": 8, "vision_prompt_depth": 12, "template": words}
    assert sum(value.numel() for value in vision.parameters.values()) == 73_728
    assert set(vision.parameters) == {f"vision_prompt.{k}" for k in range(LAYERS)}


def test_coop_and_cocoop():
    plain = {"class_specific": False, "class_token_position": "end"}
    assert convert(coop(16)).config == {"prompt_length": 16, "init_text": "", **plain}
    assert convert(coop(4)).config == {"prompt_length": 4, "init_text": "a photo of a", **plain}
    specific = convert(coop(4, CLASSES))
    assert specific.config["class_specific"]
    assert specific.config["init_text"] == ""
    assert specific.parameters["text_prompt.0"].shape == (CLASSES, 4, HT)
    got = convert(cocoop())
    assert got.config == {"prompt_length": 4, "init_text": "a photo of a", "meta_net_reduction": 16}
    assert sum(value.numel() for value in got.parameters.values()) == 35_360
    assert got.parameters["meta_net.0.weight"].shape == (32, D)
    assert got.parameters["meta_net.1.weight"].shape == (HT, 32)
    assert got.info["embedding_width"] == D


def test_prompts_trained_in_another_way():
    got = convert(kgcoop())
    assert got.method == "kgcoop"
    assert got.config == {"prompt_length": 4, "init_text": "a photo of a"}
    assert got.parameters.keys() == {"text_prompt.0"}
    assert got.info["dropped_keys"] == 3
    assert convert(coop(16)).method == "coop", "ProGrad's files are CoOp's"
    prograd = convert(coop(16), method="prograd", init_text="a type of pet, a photo of a")
    assert prograd.config == {"prompt_length": 16, "teacher_template": "a type of pet, a photo of a {}."}
    assert torch.equal(prograd.parameters["text_prompt.0"], coop(16)["ctx"].float())
    assert convert(promptsrc()).method == "independent_vl"
    assert convert(promptsrc(), method="promptsrc").config == convert(promptsrc()).config
    assert sum(value.numel() for value in convert(promptsrc()).parameters.values()) == 46_080


def test_a_text_prompt_alone_is_recognised_by_the_frozen_model():
    whole = {"prompt_learner.ctx": draw(4, HT), **frozen()}
    assert convert(whole).method == "deep_language"
    assert convert(whole).config == {"prompt_length": 4, "prompt_depth": 1, "init_text": "a photo of a"}
    assert convert(whole, method="coop").method == "coop"
    assert convert({"prompt_learner.ctx": draw(4, HT)}).method == "coop"


def test_prefixes_and_a_second_image_encoder_are_accepted():
    parallel = convert({f"module.{key}": value for key, value in maple().items()})
    assert parallel.parameters.keys() == convert(maple()).parameters.keys()
    prefixed = convert({f"prompt_learner.{key}": value for key, value in cocoop().items()})
    assert prefixed.method == "cocoop"
    teacher = {f"prompt_learner.ZS_{key}": value for key, value in frozen().items() if key.startswith("image")}
    assert convert(ivlp() | teacher).method == "independent_vl"


DEEP = "prompt_learner.compound_prompts_text."
PROJECTION = "prompt_learner.compound_prompt_projections."


@pytest.mark.parametrize(
    ("state", "change", "message"),
    [
        (maple, {f"{DEEP}3": None}, r"text_prompt lacks layer 4 of 9"),
        (maple, {"prompt_learner.ctx": None}, r"text_prompt lacks layer 0 of 9"),
        (maple, {f"{PROJECTION}2.bias": None}, r"coupling function of layer 3 has no bias"),
        (maple, {f"{PROJECTION}7.bias": None, f"{PROJECTION}7.weight": None}, r"layers \[8\] have only one"),
        (maple, {f"{DEEP}1": draw(3, HT)}, r"text_prompt\.2 has shape \[3, 512\], but text_prompt\.0 has \[2, 512\]"),
        (maple, {f"{PROJECTION}1.weight": draw(HV, HV)}, r"layer 2 has weight \[768, 768\]"),
        (maple, {"prompt_learner.proj.bias": draw(HT)}, r"\[512, 512\] and \[512\] are needed"),
        (maple, {"image_encoder.VPT": draw(2, HV)}, r"'image_encoder\.VPT' does not belong to maple"),
        (maple, {f"{DEEP}x": draw(2, HT)}, r"unknown key 'prompt_learner\.compound_prompts_text\.x'"),
        (maple, {"image_encoder.adapter.weight": draw(2)}, r"unknown key 'image_encoder\.adapter\.weight'"),
        (maple, {"module.prompt_learner.ctx": draw(2, HT)}, r"has both 'prompt_learner\.ctx' and 'module\."),
        (maple, {"prompt_learner.ctx": torch.full((2, HT), torch.nan)}, r"ctx' has NaN"),
        (maple, {"prompt_learner.ctx": torch.full((2, HT), 1e300, dtype=torch.float64)}, r"NaN or infinite"),
        (maple, {"prompt_learner.ctx": torch.ones(2, HT).long()}, r"dtype torch\.int64"),
        (maple, {"prompt_learner.ctx": [1.0]}, r"is a list; a tensor is needed"),
        (maple, {"prompt_learner.ctx": torch.empty(0, HT)}, r"contains no numbers"),
        (maple, {7: draw(1)}, r"the key 7"),
        (ivlp, {"image_encoder.VPT": None}, r"vision_prompt lacks layer 0 of 12"),
        (ivlp, {"prompt_learner.ctx": None}, r"text_prompt lacks layer 0 of 12"),
        (ivlp, {"text_encoder.transformer.resblocks.4.VPT_shallow": None}, r"text_prompt lacks layer 4"),
        (ivlp, {"text_encoder.transformer.resblocks.0.VPT_shallow": draw(2, HT)}, r"has both .* for layer 0"),
        (ivlp, {"prompt_learner.ctx": draw(HT)}, r"text_prompt\.0 has shape \[512\]"),
        (coop, {"ctx": draw(HT)}, r"allowed are \[P, Ht\] and \[C, P, Ht\]"),
        (coop, {"ctx": draw(CLASSES + 1, 4, HT)}, r"has 6 classes, but the stored token vectors 5"),
        (cocoop, {"meta_net.linear2.weight": None, "meta_net.linear2.bias": None}, r"lacks linear2"),
        (kgcoop, {"ctx": None}, r"text_prompt lacks layer 0"),
        (kgcoop, {"bias_vectors": None}, r"lacks linear2"),
        (kgcoop, {"image_encoder.VPT": draw(2, HV)}, r"'image_encoder\.VPT' does not belong to kgcoop"),
        (cocoop, {"ctx": None}, r"text_prompt lacks layer 0"),
        (cocoop, {"ctx": draw(4, HV)}, r"linear2 has weight \[512, 32\]"),
        (lambda: cocoop(200), {}, r"200 outputs for 512 inputs"),
        (frozen, {}, r"no learned prompt"),
    ],
)
def test_a_wrong_state_dict_is_named(state, change, message):
    merged = {key: value for key, value in (state() | change).items() if value is not None}
    with pytest.raises(CheckpointError, match=message):
        convert(merged)


def test_the_method_is_checked():
    with pytest.raises(ConfigError, match="unknown method 'MaPLe'; choose one of: maple"):
        convert(maple(), method="MaPLe")
    with pytest.raises(CheckpointError, match=r"keys are those of maple, not of 'coop'"):
        convert(maple(), method="coop")
    with pytest.raises(CheckpointError, match=r"keys are those of kgcoop, not of 'coop'"):
        convert(kgcoop(), method="coop")
    with pytest.raises(CheckpointError, match=r"of 4 tokens cannot have started from init_text 'a type of pet, a"):
        convert(coop(4), method="prograd", init_text="a type of pet, a photo of a")
    with pytest.raises(ConfigError, match="init_text is None"):
        convert(maple(), init_text=None)
    assert issubclass(UnsafeCheckpointError, CheckpointError)
    assert issubclass(CheckpointError, MapleError)
    assert os.sep not in repr(Placeholder("x" * 999))
