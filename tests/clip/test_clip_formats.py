"""The same CLIP in every format: the same logits, the same fingerprint."""

import json
import warnings
import zipfile
from pathlib import Path
from typing import Any

import clip_files as files
import open_clip
import pytest
import torch
from open_clip.model import CLIPVisionCfg
from safetensors.torch import load_file

from maple.clip import Backbone, load_clip, tower_depths
from maple.clip.backbone_names import has_clip_blocks
from maple.clip.checkpoints.configurations import sentence_limit
from maple.clip.checkpoints.formats import published_head_width, read_tensors
from maple.errors import BackboneError


def agree(backbone: Backbone, state: files.State, *, quick_gelu: bool) -> None:
    expected = files.expected_logits(state, quick_gelu=quick_gelu)
    torch.testing.assert_close(files.logits(backbone), expected, rtol=1e-5, atol=1e-5)
    assert expected.std() > 0.05, "all logits alike would prove nothing"
    assert backbone.fingerprint == files_fingerprint(state)
    assert backbone.embed_dim == 64
    assert (backbone.image.width, backbone.image.depth) == (128, 3)
    assert (backbone.text.width, backbone.text.depth, backbone.text.context_length) == (64, 2, 77)
    assert backbone.preprocessing.size == 32


def files_fingerprint(state: files.State) -> str:
    from maple.clip.load import backbone_from_state_dict

    return backbone_from_state_dict(state).fingerprint


OPENAI_FILES = {
    "archive.pt": lambda state, path: files.save_torchscript(state, path),
    "state.pt": lambda state, path: files.save_pickle(state, path),
    "sizes.pt": lambda state, path: files.save_pickle({**state, **files.OPENAI_SIZES}, path),
    "plain_sizes.pt": lambda state, path: files.save_pickle({**state, "input_resolution": 32}, path),
    "training.pt": lambda state, path: files.save_pickle(
        {"epoch": 3, "name": "run", "state_dict": {f"module.{key}": value for key, value in state.items()}}, path
    ),
    "weights.safetensors": lambda state, path: files.save_safetensors(state, path),
}


@pytest.mark.parametrize("file", OPENAI_FILES)
@pytest.mark.parametrize("half", [False, True], ids=["fp32", "fp16"])
def test_openai_layout(state: files.State, tmp_path: Path, file: str, half: bool) -> None:
    stored = {key: value.half() for key, value in state.items()} if half else state
    path = OPENAI_FILES[file](stored, tmp_path / file)
    known = file in ("archive.pt", "sizes.pt", "plain_sizes.pt")
    backbone = load_clip(str(path), None if known else "quickgelu")
    agree(backbone, {key: value.float() for key, value in stored.items()}, quick_gelu=True)


def test_heads_of_another_width_are_those_of_the_architecture_of_these_sizes(tmp_path: Path, registered: Any) -> None:
    """OpenAI's layout does not store them: a state dict has those of open_clip's architecture, OpenAI's files 64."""
    config = files.changed(vision={"head_width": 32})
    state = files.random_state(config)
    path = files.save_pickle(state, tmp_path / "w.pt")
    registered("Narrow-Heads", config)
    expected = files.expected_logits(state, quick_gelu=False, config=config)
    assert (expected - files.expected_logits(state, quick_gelu=False)).abs().max() > 1e-3, "both widths fit the weights"
    torch.testing.assert_close(files.logits(load_clip(str(path), "gelu")), expected, rtol=1e-5, atol=1e-5)
    agree(load_clip(str(files.save_torchscript(state, tmp_path / "archive.pt"))), state, quick_gelu=True)
    registered("Wide-Heads", files.CONFIG)
    with pytest.raises(BackboneError, match=r"may be Narrow-Heads or Wide-Heads, .* name the architecture, with pretr"):
        load_clip(str(path), "gelu")


def test_heads_of_every_architecture_are_known_by_its_sizes() -> None:
    """A ViT-H, whose width is a multiple of 64 as OpenAI's are, has heads of 80 channels."""
    widths = {}
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        vision = {**vars(CLIPVisionCfg()), **config["vision_cfg"]}
        if has_clip_blocks(config) and isinstance(vision["layers"], int):
            tower = {key: vision[key] for key in ("layers", "width", "patch_size")}
            widths[name] = published_head_width(tower, name)
            assert widths[name] == vision["head_width"]
    assert (widths["ViT-B-16"], widths["ViT-H-14"], widths["ViT-g-14"], widths["ViT-bigG-14"]) == (64, 80, 88, 104)


def test_a_torchscript_archive_is_read_as_torch_does_but_never_compiled(state: files.State, tmp_path: Path) -> None:
    path = files.save_torchscript({key: value.half() for key, value in state.items()}, tmp_path / "archive.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = dict(torch.jit.load(str(path)).state_dict())
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    assert any("/code/" in name for name in records)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records.items():
            archive.writestr(name, b"not a program" if "/code/" in name else content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(RuntimeError):
            torch.jit.load(str(path))
    found = read_tensors(path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) and found[key].dtype == value.dtype for key, value in expected.items())
    assert all(value.data_ptr() % 64 == 0 for value in found.values()), "the model must be able to keep it"


def test_one_element_logit_scale_counts_the_same(state: files.State, tmp_path: Path) -> None:
    path = files.save_safetensors({**state, "logit_scale": state["logit_scale"][None]}, tmp_path / "a.safetensors")
    agree(load_clip(str(path), "quickgelu"), state, quick_gelu=True)


def test_home_and_relative_paths(state: files.State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files.save_safetensors(state, tmp_path / "clip.safetensors")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    here, home = (load_clip(path, "gelu") for path in ("clip.safetensors", "~/clip.safetensors"))
    assert here.fingerprint == home.fingerprint


@pytest.mark.parametrize("quick_gelu", [False, True])
@pytest.mark.parametrize(
    "weights", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin", "model.safetensors", "epoch_9.pt"]
)
def test_open_clip_folder(state: files.State, tmp_path: Path, weights: str, quick_gelu: bool) -> None:
    config = files.changed(quick_gelu=quick_gelu)
    backbone = load_clip(str(files.save_open_clip(state, tmp_path / "m", weights=weights, config=config)))
    agree(backbone, state, quick_gelu=quick_gelu)
    seen = backbone.preprocessing
    assert [list(seen.mean), list(seen.std), seen.interpolation] == list(files.PREPROCESS.values())


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
@pytest.mark.parametrize("form", ["whole", "sharded", "legacy", "legacy sharded"])
def test_transformers_folder(state: files.State, tmp_path: Path, activation: str, form: str) -> None:
    folder = files.save_transformers(state, tmp_path / "m", activation, shard="5MB" if "sharded" in form else "5GB")
    assert (folder / "model.safetensors.index.json").is_file() == ("sharded" in form)
    if "legacy" in form:
        _as_legacy(folder)
    backbone = load_clip(str(folder))
    agree(backbone, state, quick_gelu=activation == "quick_gelu")
    seen = backbone.preprocessing
    assert [list(seen.mean), list(seen.std), seen.interpolation] == list(files.PREPROCESS.values())


def _as_legacy(folder: Path) -> None:
    """Rewrite as older transformers did: pickles, and position ids among the weights."""
    index = folder / "model.safetensors.index.json"
    for part in folder.glob("*.safetensors"):
        name = part.name.replace("model", "pytorch_model").replace(".safetensors", ".bin")
        ids = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
        torch.save({**load_file(part), **ids}, folder / name)
        part.unlink()
    if index.is_file():
        text = index.read_text().replace("model-0", "pytorch_model-0").replace(".safetensors", ".bin")
        (folder / "pytorch_model.bin.index.json").write_text(text)
        index.unlink()


def test_transformers_settings_of_each_tower(tmp_path: Path) -> None:
    """Head width, norm epsilon and hidden width are each tower's own, as transformers itself computes them."""
    from transformers import CLIPModel

    vision = {"num_attention_heads": 8, "layer_norm_eps": 1e-2, "intermediate_size": 227}
    text = {"num_attention_heads": 4, "layer_norm_eps": 1e-1, "intermediate_size": 201}
    model = files.shaken(CLIPModel(files.transformers_config("gelu", vision=vision, text=text)))
    model.save_pretrained(tmp_path)
    backbone = load_clip(str(tmp_path))
    ids = backbone.tokenize(files.SENTENCES)
    with torch.no_grad():
        expected = model(input_ids=ids, pixel_values=files.images()).logits_per_image
    torch.testing.assert_close(files.logits(backbone), expected, rtol=1e-5, atol=1e-5)


def test_every_hidden_width_survives_the_ratio() -> None:
    from maple.clip.checkpoints.formats import mlp_ratio

    wrong = [(h, w) for w in range(1, 130) for h in range(1, 600) if int(w * mlp_ratio(h, w)) != h]
    assert not wrong


def test_second_configuration_of_old_transformers_files_wins(state: files.State, tmp_path: Path) -> None:
    folder = files.save_transformers(state, tmp_path / "m", "gelu")
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    config["vision_config_dict"] = config["vision_config"]
    config["text_config_dict"] = {**config["text_config"]}
    config["vision_config"], config["text_config"]["num_hidden_layers"] = None, 12
    (folder / "config.json").write_text(json.dumps(config))
    agree(load_clip(str(folder)), state, quick_gelu=False)


def test_sizes_of_a_transformers_folder_are_known_without_its_weights(tmp_path: Path) -> None:
    """Long-CLIP reads 248 tokens."""
    config: dict[str, Any] = {"model_type": "clip", "vision_config": {"num_hidden_layers": 24}}
    config["text_config"] = {"max_position_embeddings": 248, "num_hidden_layers": 6}
    (tmp_path / "config.json").write_text(json.dumps(config))
    limit = sentence_limit(str(tmp_path))
    assert limit is not None
    assert (limit[1], tower_depths(str(tmp_path))) == (248, (6, 24))
    (tmp_path / "config.json").write_text(json.dumps({**config, "text_config_dict": {"max_position_embeddings": 64}}))
    assert (sentence_limit(str(tmp_path)) or (None, 0))[1] == 64
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip", "text_config": {}}))
    assert (sentence_limit(str(tmp_path)) or (None, 0))[1] == 77


def test_a_folder_of_both_formats_with_weights_of_transformers_alone(state: files.State, tmp_path: Path) -> None:
    folder = files.save_transformers(state, tmp_path / "m", "gelu")
    described = {"model_cfg": files.CONFIG, "preprocess_cfg": files.PREPROCESS}
    (folder / "open_clip_config.json").write_text(json.dumps(described))
    agree(load_clip(str(folder)), state, quick_gelu=False)


def test_transformers_without_preprocessor_reads_as_openai(state: files.State, tmp_path: Path) -> None:
    folder = files.save_transformers(state, tmp_path / "m", "gelu")
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    assert load_clip(str(folder)).preprocessing.mean == pytest.approx((0.48145466, 0.4578275, 0.40821073))
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    assert list(load_clip(str(folder)).preprocessing.mean) == files.PREPROCESS["mean"]


@pytest.mark.parametrize("save", [files.save_pickle, files.save_safetensors, files.save_torchscript])
@pytest.mark.parametrize("quick_gelu", [False, True])
def test_architecture_and_file(
    state: files.State, tmp_path: Path, registered: Any, save: Any, quick_gelu: bool
) -> None:
    name = registered("Tiny-8", files.changed(quick_gelu=quick_gelu))
    path = save(state, tmp_path / ("w.safetensors" if save is files.save_safetensors else "w.pt"))
    openai = save is files.save_torchscript
    agree(load_clip(name, str(path)), state, quick_gelu=quick_gelu or openai)


def test_architecture_wins_over_a_folder_of_its_name(
    state: files.State, tmp_path: Path, registered: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = registered("Tiny-8", files.CONFIG)
    files.save_open_clip(state, tmp_path / "work" / name)
    monkeypatch.chdir(tmp_path / "work")
    assert load_clip(name, "random:1").fingerprint != load_clip(f"./{name}").fingerprint


def test_native_weights_fill_a_custom_text_model(state: files.State, tmp_path: Path, registered: Any) -> None:
    name = registered("Tiny-custom", files.changed(custom_text=True, quick_gelu=False))
    path = files.save_safetensors(state, tmp_path / "w.safetensors")
    backbone = load_clip(name, str(path))
    assert type(backbone.model).__name__ == "CustomTextCLIP"
    assert backbone.text.obstacle is None
    expected = files.expected_logits(state, quick_gelu=False)
    torch.testing.assert_close(files.logits(backbone), expected, rtol=1e-5, atol=1e-5)
