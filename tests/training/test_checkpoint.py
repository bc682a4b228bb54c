"""Prompts files: what is in them, and which are refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import maple
from maple.checkpoint import describe, load_prompts, put_parameters, read_prompts, save_prompts
from maple.clip import Backbone, load_clip
from maple.errors import CheckpointError, ConfigError
from maple.methods import METHODS, Method, build_method
from maple.methods.zero_shot import ZeroShot

Rewrite = Callable[..., Path]


@pytest.fixture
def method(backbone: Backbone) -> Method:
    return build_method({"name": "maple", "prompt_depth": 2}, backbone, ["cat", "fire_truck"])


@pytest.fixture
def path(method: Method, tmp_path: Path) -> Path:
    save_prompts(tmp_path / "prompts.safetensors", method, {"dataset": "pictures"})
    return tmp_path / "prompts.safetensors"


def raw(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(str(path), framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
        return tensors, json.loads(opened.metadata()["maple"])


def rewrite(path: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], object]) -> None:
    tensors, content = raw(path)
    change(tensors, content)
    save_file(tensors, path, metadata={"maple": json.dumps(content)})


def test_content(path: Path, method: Method, backbone: Backbone) -> None:
    stored = read_prompts(path)
    assert stored.method == describe(method)
    assert stored.method["name"] == "maple"
    assert stored.backbone == {
        "name": "small",
        "pretrained": None,
        "precision": "fp32",
        "fingerprint": backbone.fingerprint,
        "activation": "quickgelu",
        "preprocessing": {
            "size": 32,
            "resize": "shortest",
            "resize_size": 32,
            "fill": 0,
            "interpolation": "bicubic",
            **{key: list(getattr(backbone.preprocessing, key)) for key in ("mean", "std")},
        },
    }
    assert stored.class_names == ("cat", "fire_truck")
    assert stored.info["dataset"] == "pictures"
    assert stored.info["versions"]["maple"] == maple.__version__
    assert stored.tensors.keys() == method.prompt_parameters().keys()
    assert path.stat().st_size < 100_000 + sum(4 * value.numel() for value in stored.tensors.values())


def test_saving_twice_gives_the_same_bytes(path: Path, method: Method) -> None:
    before = path.read_bytes()
    save_prompts(path, method, {"dataset": "pictures"})
    assert path.read_bytes() == before


def test_the_backbone_is_loaded_by_its_name(tmp_path: Path) -> None:
    method = build_method({"name": "vpt", "vision_prompt_depth": 2}, load_clip("maple-tiny", "random:3"), ["cat"])
    save_prompts(tmp_path / "p.safetensors", method)
    loaded = load_prompts(tmp_path / "p.safetensors")
    assert loaded.backbone.fingerprint == method.backbone.fingerprint
    assert not loaded.training
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded.predict_logits(images), method.predict_logits(images))


def test_a_backbone_in_another_precision_is_the_same_one(path: Path, small_state: dict[str, Tensor]) -> None:
    from maple.clip.load import backbone_from_state_dict

    assert load_prompts(path, backbone_from_state_dict(small_state, precision="bf16")).backbone.precision == "bf16"


def test_another_backbone_is_refused(path: Path, backbone: Backbone, other_backbone: Backbone) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_prompts(path, other_backbone)
    message = str(caught.value)
    for part in ("small", "other", backbone.fingerprint, other_backbone.fingerprint, "load that backbone, or train"):
        assert part in message


CHANGES: dict[str, tuple[Callable[[dict[str, Tensor], dict[str, Any]], object], str]] = {
    "missing": (lambda t, _: t.pop("coupling.1.bias"), r"coupling.1.bias is missing"),
    "unknown": (lambda t, _: t.update(extra=torch.zeros(1)), r"extra is unknown"),
    "misshapen": (
        lambda t, _: t.update({"text_prompt.0": torch.zeros(3, 64)}),
        r"text_prompt.0 has shape \[3, 64\] instead of \[2, 64\]",
    ),
    "nan": (lambda t, _: t["text_prompt.1"][0].fill_(torch.nan), r"text_prompt.1 holds values that are not finite"),
    "inf": (lambda t, _: t["text_prompt.1"][0].fill_(torch.inf), r"text_prompt.1 holds values that are not finite"),
    "newer": (lambda _, c: c.update(format=2), r"has format 2; this version of maple reads format 1: upgrade maple"),
    "no format": (lambda _, c: c.pop("format"), r"has format None"),
    "no method": (lambda _, c: c.pop("method"), r"lacks a part of its metadata: 'method'"),
    "no fingerprint": (lambda _, c: c["backbone"].pop("fingerprint"), r"lacks a part .*'fingerprint'"),
    "text backbone": (lambda _, c: c.update(backbone="ViT"), r"lacks a part of its metadata"),
    "unknown method": (lambda _, c: c["method"].update(name="later"), r"cannot build: unknown method 'later'"),
    "unknown setting": (lambda _, c: c["method"].update(colour=1), r"cannot build: .*unknown setting '.*colour'"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_refused(change: str, path: Path, backbone: Backbone) -> None:
    alter, message = CHANGES[change]
    rewrite(path, alter)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_prompts(path, backbone)
    assert "prompts.safetensors" in str(caught.value)


def test_damaged_and_foreign_files(path: Path, backbone: Backbone, tmp_path: Path) -> None:
    whole = path.read_bytes()
    for length in (0, 4, 200, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"prompts.safetensors is not a readable prompts file: "):
            load_prompts(path, backbone)
    path.write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(CheckpointError, match="not a readable prompts file"):
        load_prompts(path, backbone)
    with pytest.raises(CheckpointError, match="not a readable prompts file"):
        load_prompts(tmp_path, backbone)
    for metadata in (None, {"format": "pt"}):
        save_file({"weight": torch.zeros(1)}, path, metadata=metadata)
        with pytest.raises(CheckpointError, match=r"not one that maple wrote; .*`maple import`"):
            load_prompts(path, backbone)
    for header in ("[]", "3", "null"):
        save_file({"weight": torch.zeros(1)}, path, metadata={"maple": header})
        with pytest.raises(CheckpointError, match="has format"):
            load_prompts(path, backbone)
    save_file({"weight": torch.zeros(1)}, path, metadata={"maple": "{"})
    with pytest.raises(CheckpointError, match="not a readable prompts file"):
        load_prompts(path, backbone)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"prompts.safetensors does not exist"):
        load_prompts(path, backbone)


def test_a_file_that_may_not_be_read_is_not_called_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library says that it is not there."""
    path = tmp_path / "prompts.safetensors"
    path.write_bytes(b"there")

    def open_nothing(*_: object, **__: object) -> None:
        raise FileNotFoundError(str(path))

    monkeypatch.setattr("maple.checkpoint.safe_open", open_nothing)
    with pytest.raises(CheckpointError, match="cannot be read: permission denied"):
        read_prompts(path)


def test_nothing_is_set_unless_all_fits(method: Method) -> None:
    before = {name: value.detach().clone() for name, value in method.prompt_parameters().items()}
    other = {name: value + 1 for name, value in before.items()}
    with pytest.raises(CheckpointError, match=r"^the file does not fit .*'maple'.*: coupling.0.bias is missing$"):
        put_parameters(method, {n: v for n, v in other.items() if n != "coupling.0.bias"}, source="the file")
    assert all(torch.equal(before[name], value) for name, value in method.prompt_parameters().items())


@pytest.mark.parametrize("moment", ["save", "os.fsync", "Path.replace"])
def test_a_failure_while_writing_leaves_the_old_file(
    moment: str, path: Path, method: Method, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = path.read_bytes()

    def fail(*_: object, **__: object) -> None:
        raise OSError("the disk is full")

    with torch.no_grad():
        next(iter(method.prompt_parameters().values())).add_(1)
    target = {"save": "maple.checkpoint.save", "os.fsync": "os.fsync", "Path.replace": "pathlib.Path.replace"}
    monkeypatch.setattr(target[moment], fail)
    with pytest.raises(OSError, match="the disk is full"):
        save_prompts(path, method)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["prompts.safetensors"]
    save_prompts(path, method)
    assert path.read_bytes() != before


def test_a_method_that_nobody_could_load_is_not_saved(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Mine(ZeroShot):
        """A user's own."""

    mine = Mine(ZeroShot.Settings(), backbone, ["cat"], torch.Generator())
    with pytest.raises(ConfigError, match=r"Mine is not in METHODS"):
        save_prompts(tmp_path / "p.safetensors", mine)
    monkeypatch.setitem(METHODS, "mine", Mine)
    save_prompts(tmp_path / "p.safetensors", mine)
    assert type(load_prompts(tmp_path / "p.safetensors", backbone)) is Mine
