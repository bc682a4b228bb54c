"""What a folder or a file may make this package do: nothing but read tensors. And what a file may name."""

import json
import sys
from pathlib import Path
from typing import Any

import clip_files as files
import open_clip
import pytest
import torch
from huggingface_hub import constants
from safetensors import safe_open
from safetensors.torch import save_file
from typer.testing import CliRunner

from maple import PromptClassifier, load_clip, load_prompts
from maple.checkpoint import save_prompts
from maple.cli import app
from maple.clip import backbone_names
from maple.clip.backbone_names import remember, require_trusted, with_absolute_paths
from maple.errors import BackboneError, CheckpointError, MapleError, UntrustedBackboneError
from maple.methods import build_method

TRAP = (
    "import pathlib\npathlib.Path({path!r}).touch()\nclass Evil: ...\nEvilConfig = EvilTokenizer = EvilModel = Evil\n"
)


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that exists once any code of the folder `evil` has run; nothing may ask, and nothing may be fetched."""
    touched = tmp_path / "executed"
    (tmp_path / "evil").mkdir()
    for module in ("evil", "configuration_evil", "tokenization_evil"):
        (tmp_path / "evil" / f"{module}.py").write_text(TRAP.format(path=str(touched)))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run code"))
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("used the network"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return touched


AUTO_MAP = {
    "tokenizer_class": "EvilTokenizer",
    "model_type": "evil",
    "auto_map": {
        "AutoTokenizer": ["tokenization_evil.EvilTokenizer", None],
        "AutoConfig": "configuration_evil.EvilConfig",
        "AutoModel": "evil.EvilModel",
    },
}
FOLDERS: dict[str, dict[str, Any]] = {
    "remote code": {"text": {"hf_tokenizer_name": "x/y", "tokenizer_kwargs": {"trust_remote_code": True}}},
    "code revision": {"text": {"hf_tokenizer_name": "x/y", "tokenizer_kwargs": {"code_revision": "main"}}},
    "tokenizer type": {"text": {"hf_tokenizer_name": "x/y", "tokenizer_kwargs": {"tokenizer_type": "bert"}}},
    "list argument": {"text": {"hf_tokenizer_name": "x/y", "tokenizer_kwargs": {"clean": ["lower"]}}},
    "auto_map": {"text": {"hf_tokenizer_name": "x/y"}},
    "auto_map, clips": {"text": {"hf_tokenizer_name": "x/y", "tokenizer_mode": "clips"}},
    "tokenizer is a list": {"text": {"hf_tokenizer_name": ["x"], "tokenizer_kwargs": ["trust_remote_code"]}},
    "text tower in the folder": {"text": {"hf_model_name": "."}},
    "text tower above": {"text": {"hf_model_name": "../evil", "hf_model_pretrained": True}},
    "text tower is a list": {"text": {"hf_model_name": [1]}},
    "pooler": {"text": {"hf_model_name": "x", "hf_pooler_type": "__class__"}},
    "timm on the hub": {"vision": {"timm_model_name": "hf-hub:x/evil", "timm_model_pretrained": True}},
    "timm, older": {"vision": {"timm_model_name": "hf_hub:x/evil"}},
    "timm in a folder": {"vision": {"timm_model_name": "local-dir:evil"}},
    "timm path": {"vision": {"timm_model_name": "evil/resnet18"}},
    "timm unknown": {"vision": {"timm_model_name": "evil"}},
    "timm is a list": {"vision": {"timm_model_name": ["resnet18"]}},
    "unknown key": {"pretrained": "https://example.org/evil.pt"},
    "layers": {"vision": {"layers": 10**9}},
    "text layers": {"text": {"layers": 10**7}},
    "multimodal layers": {"multimodal_cfg": {"layers": 10**8}, "custom_text": True},
    "width": {"vision": {"width": 2**20}},
    "patches": {"vision": {"image_size": 4096, "patch_size": 1, "pos_embed_type": "sin_cos_2d"}},
    "image": {"vision": {"image_size": 10**9, "patch_size": 10**8}},
    "sentence": {"text": {"context_length": 10**6}},
    "vocabulary": {"text": {"vocab_size": 10**9}},
    "embedding": {"embed_dim": 10**9},
    "ratio": {"vision": {"mlp_ratio": 1e12}},
    "not a number": {"vision": {"mlp_ratio": float("nan")}},
    "infinity": {"text": {"mlp_ratio": float("inf")}},
    "negative": {"vision": {"width": -128}},
    "zero heads": {"vision": {"head_width": 0}},
    "text width": {"text": {"width": "64"}},
    "queries": {"vision": {"attentional_pool": True, "attn_pooler_queries": 10**9}},
    "tower is a list": {"vision_cfg": []},
    "tower is text": {"text_cfg": "roberta-base"},
    "layer keywords": {"vision": {"norm_kwargs": {"elementwise_affine": {"a": 1}}, "act_kwargs": {"x": 1}}},
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_runs_imports_and_fetches_nothing(
    state: files.State, tmp_path: Path, trap: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "evil"
    config = {"model_cfg": files.changed(**FOLDERS[kind])}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    files.save_safetensors(state, folder / "open_clip_model.safetensors")
    for name in ("config.json", "tokenizer_config.json"):
        (folder / name).write_text(json.dumps(AUTO_MAP))
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    with pytest.raises(BackboneError):
        load_clip("evil")
    assert not trap.exists()
    assert not [name for name in set(sys.modules) - before if "evil" in name]


@pytest.mark.parametrize("preprocess", [{"mean": [1]}, {"std": [0, 1, 1]}, {"mean": "x"}, {"std": [1e999] * 3}, [1]])
def test_values_for_images_are_checked(state: files.State, tmp_path: Path, preprocess: Any) -> None:
    folder = files.save_open_clip(state, tmp_path / "m")
    described = {"model_cfg": files.CONFIG, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(described))
    with pytest.raises(BackboneError):
        load_clip(str(folder))


@pytest.mark.parametrize("shard", ["../w.bin", "/etc/passwd", "a/../../w.bin", "..", "", "C:w.bin", "a\\b", "x\0y"])
def test_an_index_names_files_next_to_it(state: files.State, tmp_path: Path, shard: str) -> None:
    folder = files.save_transformers(state, tmp_path / "m", "gelu", shard="5MB")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(BackboneError, match="weight files are next to it"):
        load_clip(str(folder))


def test_arguments_that_published_models_have_still_work(state: files.State, tmp_path: Path) -> None:
    config = files.changed(text={"tokenizer_kwargs": {"clean": "canonicalize"}})
    backbone = load_clip(str(files.save_open_clip(state, tmp_path / "m", config=config)))
    expected = open_clip.SimpleTokenizer(context_length=77, clean="canonicalize")(["A cat, a dog!"])
    assert torch.equal(backbone.tokenize(["A cat, a dog!"]), expected.long())


def test_every_configuration_of_open_clip_is_allowed(tmp_path: Path) -> None:
    from maple.clip.checkpoints.formats import read_open_clip_config

    for name in open_clip.list_models():
        (tmp_path / "c.json").write_text(json.dumps({"model_cfg": open_clip.get_model_config(name)}))
        assert read_open_clip_config(tmp_path / "c.json")[0]["embed_dim"]


def test_numbers_of_another_kind_are_refused(state: files.State, tmp_path: Path) -> None:
    path = files.save_safetensors(
        {**state, "ln_final.bias": torch.zeros(64, dtype=torch.int32)}, tmp_path / "w.safetensors"
    )
    with pytest.raises(BackboneError, match=r"not of floating-point numbers: ln_final.bias \(int32\)"):
        load_clip(str(path), "quickgelu")


# ---- what a file may name


@pytest.fixture
def clip(state: files.State, tmp_path: Path) -> Path:
    return files.save_open_clip(state, tmp_path / "clips" / "mine")


@pytest.fixture
def prompts(clip: Path, tmp_path: Path, own_record: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Prompts that name the CLIP `clip`, as they come from another user."""
    path = tmp_path / "prompts.safetensors"
    save_prompts(path, build_method({"name": "coop", "prompt_length": 2}, load_clip(str(clip)), ["cat", "dog"]))
    own_record.unlink()
    monkeypatch.setattr(backbone_names, "_given", set())
    return path


def renamed(path: Path, **backbone: Any) -> Path:
    with safe_open(path, "pt") as file:
        content = json.loads(file.metadata()["maple"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    content["backbone"] |= backbone
    save_file(tensors, path, {"maple": json.dumps(content)})
    return path


def test_what_was_given_may_be_named(
    prompts: Path, clip: Path, own_record: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UntrustedBackboneError, match=r"clips/mine', and files .*backbone=PATH.*trust_backbone=True"):
        load_prompts(prompts)
    assert not own_record.exists()
    monkeypatch.chdir(clip.parent)
    load_clip("mine")
    monkeypatch.setattr(backbone_names, "_given", set())
    assert json.loads(own_record.read_text()) == [{"name": str(clip), "pretrained": None}]
    assert load_prompts(prompts).backbone.name == str(clip)


@pytest.mark.parametrize("way", ["trust", "backbone", "loaded", "classifier", "classifier, backbone"])
def test_the_ways_to_consent(prompts: Path, clip: Path, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UntrustedBackboneError):
        PromptClassifier.from_pretrained(prompts, device="cpu")
    match way:
        case "trust":
            load_prompts(prompts, trust_backbone=True)
        case "backbone":
            load_prompts(prompts, str(clip))
        case "loaded":
            load_prompts(prompts, load_clip(str(clip)))
        case "classifier":
            PromptClassifier.from_pretrained(prompts, device="cpu", trust_backbone=True)
        case "classifier, backbone":
            PromptClassifier.from_pretrained(prompts, device="cpu", backbone=str(clip))
    monkeypatch.setattr(backbone_names, "_given", set())
    assert load_prompts(prompts).class_names == ("cat", "dog")


def test_another_clip_is_refused_and_a_moved_one_is_named(prompts: Path, clip: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="prompts do not work with other weights"):
        load_prompts(prompts, "maple-tiny")
    moved = clip.rename(tmp_path / "moved")
    with pytest.raises(UntrustedBackboneError, match=r"does not exist here; name your own copy"):
        load_prompts(prompts)
    assert load_prompts(prompts, str(moved)).backbone.name == str(moved)
    with pytest.raises(UntrustedBackboneError, match="does not exist here"):
        load_prompts(prompts)


NAMES: list[tuple[str, Any]] = [
    *[("clips/mine", None), ("mine", None), ("./mine", None), ("~/mine", None), ("hf-hub:lab/evil", None), ("", None)],
    *[("lab/evil", None), ("ViT-bigG-14", "random"), ("ViT-B-16", "random:7"), ("ViT-B-16", "w.pt"), ("x\0y", None)],
    *[("/dev/zero", None), ("/proc/self/mem", None), ("a" * 4000, None), ("ViT-B-16", "/etc/passwd"), (".", None)],
]


@pytest.mark.parametrize(("name", "pretrained"), NAMES, ids=lambda value: str(value)[:20])
def test_unknown_names_are_refused_before_anything_is_opened(
    prompts: Path, name: str, pretrained: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("maple.clip.load.load_backbone", lambda *_, **__: pytest.fail("it was loaded"))
    with pytest.raises(UntrustedBackboneError) as caught:
        load_prompts(renamed(prompts, name=name, pretrained=pretrained))
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("name", [3, None, ["ViT-B-16"], {}, True, "x" * 10_000_000, 1e300])
@pytest.mark.parametrize("key", ["name", "pretrained", "precision", "fingerprint"])
def test_names_of_another_kind(prompts: Path, key: str, name: Any) -> None:
    if key == "pretrained" and name is None:
        return
    with pytest.raises(MapleError) as caught:
        load_prompts(renamed(prompts, **{key: name}), trust_backbone=True)
    assert len(str(caught.value)) < 1000


def test_published_and_packaged_names_need_no_consent(own_record: Path) -> None:
    for name, pretrained in (
        *(("ViT-B-16", None), ("ViT-B/16", "openai"), ("ViT-B-16", "laion2b_s34b_b88k"), ("maple-small", None)),
        *(("maple-tiny", None), ("maple-tiny", "random:3")),
    ):
        remember(name, pretrained)
        require_trusted(name, pretrained, "a file")
    assert not own_record.exists()


def test_random_weights_and_files_are_remembered_as_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "w.pt").touch()
    monkeypatch.chdir(tmp_path)
    remember("ViT-B-16", "random:3")
    remember("ViT-B/32", "w.pt")
    remember("lab/tiny", None)
    monkeypatch.setattr(backbone_names, "_given", set())
    for known in (("ViT-B-16", "random"), ("ViT-B-32", str(tmp_path / "w.pt")), ("hf-hub:lab/tiny", None)):
        require_trusted(*known, "a file")
    for unknown in (("ViT-L-14", "random"), ("ViT-B-16", "w.pt"), ("hf-hub:lab/other", None)):
        with pytest.raises(UntrustedBackboneError):
            require_trusted(*unknown, "a file")
    (tmp_path / "lab" / "tiny").mkdir(parents=True)  # a folder of that name is not the repository
    with pytest.raises(UntrustedBackboneError):
        require_trusted("lab/tiny", None, "a file")


@pytest.mark.parametrize("content", ["", "{", "{}", "[1, [2], {}]", '[{"name": 3}]', '[{"name": "/a"', "[" * 100_000])
def test_a_damaged_record_is_not_an_error(own_record: Path, clip: Path, content: str) -> None:
    own_record.parent.mkdir(parents=True)
    own_record.write_text(content)
    load_clip(str(clip))
    assert json.loads(own_record.read_text())[-1] == {"name": str(clip), "pretrained": None}


@pytest.mark.parametrize("home", ["file", "missing", "relative"])
def test_without_a_place_for_a_record_the_process_remembers(
    prompts: Path, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: str
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file") if home == "file" else "state")
    if home == "missing":
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    else:
        monkeypatch.setenv("HOME", str(tmp_path / "file"))
    load_clip(str(clip))
    assert load_prompts(prompts).backbone.name == str(clip)
    monkeypatch.setattr(backbone_names, "_given", set())
    with pytest.raises(UntrustedBackboneError):
        load_prompts(prompts)


def test_paths_are_absolute_and_names_are_kept(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(clip.parent)
    (clip.parent / "w.pt").touch()
    (clip.parent / "ViT-B-16").mkdir()
    (clip.parent / "link").symlink_to(clip)
    for given, expected in (
        *((("mine", None), (str(clip), None)), (("./mine/", None), (str(clip), None))),
        *((("ViT-B-16", None), ("ViT-B-16", None)), (("./ViT-B-16", None), (str(clip.parent / "ViT-B-16"), None))),
        *((("ViT-B-32", "w.pt"), ("ViT-B-32", str(clip.parent / "w.pt"))), (("lab/tiny", None), ("lab/tiny", None))),
        *((("ViT-B-32", "openai"), ("ViT-B-32", "openai")), (("ViT-B-32", "random"), ("ViT-B-32", "random"))),
        (("link", None), (str(clip.parent / "link"), None)),
        *((("local-dir:mine", None), (str(clip), None)), (("local-dir:nosuch", None), ("local-dir:nosuch", None))),
        (("local-dir:ViT-B-16", None), (str(clip.parent / "ViT-B-16"), None)),
    ):
        assert with_absolute_paths(*given) == expected


@pytest.mark.parametrize("command", ["predict", "explain", "export", "serve"])
def test_commands_refuse_and_accept(prompts: Path, clip: Path, tmp_path: Path, command: str) -> None:
    from PIL import Image

    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    arguments = {
        "predict": [str(tmp_path / "a.png")],
        "export": ["--output", str(tmp_path / "out"), "--format", "openclip"],
    }
    arguments |= {"explain": [str(tmp_path / "a.png"), "--output", str(tmp_path / "maps")], "serve": ["--port", "0"]}
    run = [command, str(prompts), *arguments[command]]
    refused = CliRunner().invoke(app, run)
    assert "trust_backbone=True" in str(refused.exception) + refused.output
    if command == "serve":
        return
    for consent in (["--backbone", str(clip)], []):
        if command == "export" and not consent:
            run[run.index("--output") + 1] = str(tmp_path / "again")
        result = CliRunner().invoke(app, [*run, *consent], catch_exceptions=False)
        assert result.exit_code == 0, result.output
