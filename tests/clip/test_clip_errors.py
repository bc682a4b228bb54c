"""What cannot be loaded says so in one line: which file or name, what was found, what to do."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import clip_files as files
import pytest
import torch

from maple.clip import load_clip
from maple.clip.load import backbone_from_state_dict
from maple.errors import BackboneError


def refuses(message: str, *arguments: Any, **options: Any) -> None:
    with pytest.raises(BackboneError, match=message) as caught:
        load_clip(*arguments, **options)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1200


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ViT-B-61",), r"unknown CLIP 'ViT-B-61'.*the nearest are .*ViT-B-16"),
        (("vit-b-16",), r"unknown CLIP 'vit-b-16'.*the nearest are ViT-B-16"),
        (("ViTL14",), r"unknown CLIP 'ViTL14'.*the nearest are ViT-L-14"),
        (("zzzzzz",), r"unknown CLIP 'zzzzzz'.*list_models"),
        (("/nowhere/clip.pt",), r"unknown CLIP '/nowhere/clip.pt': it is neither a file or folder here"),
        (("weights/clip.pt",), r"unknown CLIP 'weights/clip.pt': it is neither a file or folder here"),
        (("ViT-B-16", "laion9b"), r"unknown pretrained of ViT-B-16 'laion9b'; choose one of: openai, laion400m_e31"),
        (("ViT-B-16", "gone.pt"), r"unknown pretrained of ViT-B-16 'gone.pt'.*or the path of a file"),
        (("ViT-H-14",), r"ViT-H-14 needs pretrained=...: one of laion2b_s32b_b79k.*a file, or 'random'"),
        (("ViT-B-16", "random:x"), r"pretrained='random:x': the seed must be a whole number"),
        (("ViT-B-16", "random:-1"), r"the seed must be a whole number"),
    ],
)
def test_names(arguments: tuple[str, ...], message: str) -> None:
    refuses(message, *arguments)


@pytest.mark.parametrize("device", ["gpu", "cuda:x"])
def test_unknown_device(device: str) -> None:
    refuses(f"unknown device '{device}'; write cpu, cuda", "maple-tiny", device=device)


def test_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refuses("torch sees no CUDA device on this machine; use device='cpu'", "maple-tiny", device="cuda:0")


def test_pretrained_beside_a_folder_or_file(state: files.State, tmp_path: Path) -> None:
    folder = files.save_open_clip(state, tmp_path / "m")
    refuses(
        r"has its own weights; pretrained='openai' can only be given with an architecture name", str(folder), "openai"
    )
    refuses(r"has its own weights", str(folder / "open_clip_model.safetensors"), "openai")
    refuses(r"has its own weights", "hf-hub:lab/tiny", "openai")


# ---- files


class Sentinel:
    """A pickle that creates a file when it is opened carelessly."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def _truncated(save: Callable[[files.State, Path], Path]) -> Callable[[files.State, Path], None]:
    def write(state: files.State, path: Path) -> None:
        save(state, path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return write


BAD_FILES: dict[str, tuple[str, Callable[[files.State, Path], Any], str]] = {
    "truncated safetensors": ("w.safetensors", _truncated(files.save_safetensors), "cannot be read as CLIP weights"),
    "truncated zip": ("w.pt", _truncated(files.save_pickle), "cannot be read as CLIP weights"),
    "truncated archive": ("w.pt", _truncated(files.save_torchscript), "cannot be read as CLIP weights"),
    "empty": ("w.pt", lambda _, path: path.write_bytes(b""), "cannot be read as CLIP weights: the file is empty"),
    "empty safetensors": ("w.safetensors", lambda _, path: path.write_bytes(b""), "cannot be read as CLIP weights"),
    "HTML": (
        "w.pt",
        lambda _, path: path.write_text("<!DOCTYPE html><title>Sign in</title>"),
        r"is not a torch checkpoint \(it begins with b'<!DOCTYPE.*error page",
    ),
    "pointer": (
        "w.pt",
        lambda _, path: path.write_text("version https://git-lfs.example/spec/v1\noid sha256:0\n"),
        "git lfs pull",
    ),
    "pointer, safetensors": (
        "w.safetensors",
        lambda _, path: path.write_text("version https://git-lfs.example/spec/v1\noid sha256:0\n"),
        "git lfs pull",
    ),
    "list": (
        "w.pt",
        lambda _, path: torch.save([1, 2], path),
        "holds a value of type list; a checkpoint is a",
    ),
    "no tensors": ("w.pt", lambda _, path: torch.save({"a": "text"}, path), "does not hold a state dict: 'a' is a str"),
    "nothing": ("w.pt", lambda _, path: torch.save({}, path), "does not hold a state dict of tensors: it is empty"),
    "another network": (
        "w.pt",
        lambda _, path: torch.save({"conv.weight": torch.zeros(3)}, path),
        "the tensor 'text_projection' is missing",
    ),
    "not a zip after all": (
        "w.pt",
        lambda _, path: path.write_bytes(b"PK\x05\x06" + b"\xff" * 18),
        "cannot be read as CLIP weights: is not a torch checkpoint",
    ),
}


@pytest.mark.parametrize("kind", BAD_FILES)
@pytest.mark.parametrize("as_pretrained", [False, True])
def test_bad_files(state: files.State, tmp_path: Path, kind: str, as_pretrained: bool) -> None:
    name, write, message = BAD_FILES[kind]
    write(state, tmp_path / name)
    if as_pretrained and kind == "another network":
        refuses(r"w.pt does not fit.*missing: .* and \d+ more; unknown: conv.weight", "RN50", str(tmp_path / name))
    elif as_pretrained:
        refuses(message, "RN50", str(tmp_path / name))
    else:
        refuses(message, str(tmp_path / name))


@pytest.mark.parametrize("form", ["zip", "pickle", "state_dict"])
@pytest.mark.parametrize("place", ["file", "pretrained", "open_clip folder", "transformers folder"])
def test_code_in_a_pickle_never_runs(state: files.State, tmp_path: Path, form: str, place: str) -> None:
    trap = tmp_path / "executed"
    folder = tmp_path / "m"
    if place == "transformers folder":
        files.save_transformers(state, folder, "gelu")
        (folder / "model.safetensors").unlink()
    else:
        files.save_open_clip(state, folder, weights="open_clip_pytorch_model.bin")
    path = folder / ("pytorch_model.bin" if place == "transformers folder" else "open_clip_pytorch_model.bin")
    content = {"state_dict": {"a": Sentinel(trap)}} if form == "state_dict" else Sentinel(trap)
    if form == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path)
    message = r"cannot be read as CLIP weights: .*would (come from running|run) \w+\.mkdir; nothing was run"
    arguments = {"file": (str(path),), "pretrained": ("RN50", str(path))}.get(place, (str(folder),))
    refuses(message, *arguments)
    assert not trap.exists()


def test_wrong_tensors_are_named(state: files.State, tmp_path: Path) -> None:
    def check(message: str, **changes: torch.Tensor | None) -> None:
        changed = {key: value for key, value in {**state, **changes}.items() if value is not None}
        path = files.save_safetensors(changed, tmp_path / "w.safetensors")
        refuses(f"w.safetensors.*{message}", str(path), "quickgelu")

    name = "visual.transformer.resblocks.1.ln_1.bias"
    check(f"missing: {name}$", **{name: None})
    check(r"unknown: extra.weight$", **{"extra.weight": torch.zeros(2)})
    check(rf"of another shape: {name} \(7,\) instead of \(128,\)$", **{name: torch.zeros(7)})
    check(r"positional_embedding \(15, 128\)", **{"visual.positional_embedding": torch.zeros(15, 128)})
    check(r"missing: (\S+, ){3}\S+ and \d+ more", **{key: None for key in state if "resblocks.1." in key})
    check(r"the tensor 'visual.proj' is missing|missing: visual.proj$", **{"visual.proj": None})
    check(
        r"a vocabulary of 30000 tokens, but CLIP's tokenizer has 49408",
        **{"token_embedding.weight": torch.zeros(30000, 64)},
    )
    check(r"too few dimensions", text_projection=torch.zeros(64))


def test_a_width_that_openai_heads_do_not_divide() -> None:
    for part, tower in (({"text": {"width": 96}}, "text"), ({"vision": {"width": 96, "head_width": 32}}, "image")):
        odd = files.random_state(files.changed(**part))
        with pytest.raises(BackboneError, match=f"the {tower} tower is 96 wide.*Save the model as an open_clip"):
            backbone_from_state_dict(odd)


# ---- folders


def test_folders_that_are_no_clip(state: files.State, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refuses(
        r"empty is not a CLIP: it needs open_clip_config.json \(open_clip\) or config.json", str(tmp_path / "empty")
    )
    bare = files.save_open_clip(state, tmp_path / "bare")
    (bare / "open_clip_model.safetensors").unlink()
    refuses(r"bare should hold one weight file, such as open_clip_model.safetensors; it has none", str(bare))
    (bare / "a.bin").touch()
    (bare / "b.bin").touch()
    refuses(r"several candidates \(a.bin, b.bin\)", str(bare))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is unreadable or damaged"),
        ("[1]", "should hold a JSON object, but holds \\[1\\]"),
        ("{}", "model_cfg lacks embed_dim, vision_cfg, text_cfg"),
        ('{"model_cfg": {"embed_dim": 4}}', "model_cfg lacks vision_cfg, text_cfg"),
        ('{"model_cfg": {"embed_dim": 4, "vision_cfg": {"depth": 3}, "text_cfg": {}}}', "cannot be built: .*depth"),
    ],
)
def test_open_clip_configurations(state: files.State, tmp_path: Path, content: str, message: str) -> None:
    folder = files.save_open_clip(state, tmp_path / "m")
    (folder / "open_clip_config.json").write_text(content)
    refuses(message, str(folder))


def test_open_clip_folder_of_another_size(state: files.State, tmp_path: Path) -> None:
    folder = files.save_open_clip(state, tmp_path / "m", config=files.changed(embed_dim=32))
    refuses(r"open_clip_model.safetensors does not fit.*another shape: .*\(64, 64\) instead of \(64, 32\)", str(folder))


def test_non_square_images(tmp_path: Path) -> None:
    config = files.changed(vision={"image_size": [32, 64]})
    folder = files.save_open_clip(files.random_state(config), tmp_path / "m", config=config)
    refuses(r"reads images of \(32, 64\) pixels; only square images are supported", str(folder))


def _edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_transformers_folders(state: files.State, tmp_path: Path) -> None:
    folder = files.save_transformers(state, tmp_path / "m", "gelu", shard="5MB")
    config, text = folder / "config.json", json.loads((folder / "config.json").read_text())["text_config"]
    original = config.read_text()
    for changes, message in (
        (
            {"model_type": "blip"},
            r"describes a 'blip' model; .* must have model_type 'clip' or 'metaclip_2' or 'siglip'",
        ),
        (
            {"text_config": {**text, "vocab_size": 30522}},
            r"a vocabulary of 30522 tokens, but CLIP's tokenizer has 49408",
        ),
        ({"text_config": {**text, "hidden_act": "silu"}}, r"activations are \['gelu', 'silu'\]"),
        ({"text_config": {**text, "hidden_act": "quick_gelu"}}, r"both must be quick_gelu, or both gelu"),
        ({"text_config": {**text, "num_hidden_layers": 1}}, r"unknown: transformer.resblocks.1"),
        ({"text_config": {**text, "num_attention_heads": 7}}, r"does not describe a CLIP"),
        ({"text_config": {**text, "intermediate_size": float("nan")}}, r"does not describe a CLIP"),
        ({"text_config": "none"}, r"config.json does not describe a CLIP"),
        ({"vision_config": {"hidden_size": 0, "hidden_act": "gelu"}}, r"does not describe a CLIP"),
    ):
        _edit(config, **changes)
        refuses(message, str(folder))
        config.write_text(original)
    next(folder.glob("model-00001*")).unlink()
    refuses(r"lacks model-00001.*which its model.safetensors.index.json names", str(folder))
    (folder / "model.safetensors.index.json").unlink()
    refuses(r"has a config.json but no weights: expected model.safetensors", str(folder))


def test_transformers_attention_with_a_part_missing(state: files.State, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder = files.save_transformers(state, tmp_path / "m", "gelu")
    weights = load_file(folder / "model.safetensors")
    weights.pop("text_model.encoder.layers.1.self_attn.k_proj.bias")
    files.save_safetensors(weights, folder / "model.safetensors")
    refuses(r"lacks the weights text_model.encoder.layers.1.self_attn.k_proj.bias", str(folder))
