"""Names of open_clip: tags and their activation, sizes read from the model, random weights."""

import socket
from pathlib import Path
from typing import Any

import clip_files as files
import open_clip
import pytest
import torch
from open_clip import pretrained as published
from open_clip.transformer import QuickGELU
from torch import nn

from maple.checkpoint import load_prompts, save_prompts
from maple.clip import load_clip
from maple.clip.backbone_names import is_architecture, is_hub_id
from maple.clip.checkpoints import open_clip_models as loading
from maple.clip.towers import image_tower, text_tower
from maple.errors import BackboneError, CheckpointError
from maple.methods import build_method

STANDARD = {
    "ViT-B-32": (224, 768, 12, 512, 12, 512, 49),
    "ViT-B-16": (224, 768, 12, 512, 12, 512, 196),
    "ViT-L-14": (224, 1024, 24, 768, 12, 768, 256),
    "ViT-L-14-336": (336, 1024, 24, 768, 12, 768, 576),
    "ViT-H-14": (224, 1280, 32, 1024, 24, 1024, 256),
}


def activations(model: Any) -> set[type]:
    return {type(m) for m in model.modules() if isinstance(m, QuickGELU | nn.GELU)}


@pytest.fixture
def tags(state: files.State, tmp_path: Path, registered: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Tiny stand-ins under the names of ViT-B-16 and its sibling, and a download that hands out the small CLIP."""
    path = files.save_safetensors(state, tmp_path / "weights.safetensors")
    registered("ViT-B-16", files.CONFIG)
    registered("ViT-B-16-quickgelu", files.changed(quick_gelu=True))
    asked: list[Any] = []

    def download(tag: Any, **_: Any) -> str:
        asked.append(tag)
        return str(path)

    monkeypatch.setattr(loading, "download_pretrained", download)
    return asked


@pytest.mark.parametrize("name", ["ViT-B-16", "ViT-B/16", "ViT-B-16-quickgelu"])
@pytest.mark.parametrize("pretrained", [None, "openai"])
def test_openai_tag_is_quickgelu(tags: list[Any], name: str, pretrained: str | None, state: files.State) -> None:
    backbone = load_clip(name, pretrained)
    assert activations(backbone.model) == {QuickGELU}
    torch.testing.assert_close(files.logits(backbone), files.expected_logits(state, quick_gelu=True))
    assert len(tags) == 1


@pytest.mark.parametrize("tag", ["laion2b_s34b_b88k", "datacomp_xl_s13b_b90k", "laion400m_e32"])
def test_other_tags_are_gelu(tags: list[Any], tag: str, state: files.State) -> None:
    backbone = load_clip("ViT-B-16", tag)
    assert activations(backbone.model) == {nn.GELU}
    torch.testing.assert_close(files.logits(backbone), files.expected_logits(state, quick_gelu=False))
    assert len(tags) == 1


def test_tag_decides_over_the_name(tags: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    said = {"trained_with_gelu": {"hf_hub": "lab/x/", "quick_gelu": False}, "silent": {"hf_hub": "lab/x/"}}
    names = dict(published._PRETRAINED["ViT-B-16-quickgelu"], **said)
    monkeypatch.setitem(published._PRETRAINED, "ViT-B-16-quickgelu", names)
    assert activations(load_clip("ViT-B-16-quickgelu", "trained_with_gelu").model) == {nn.GELU}
    assert activations(load_clip("ViT-B-16-quickgelu", "dfn2b").model) == {QuickGELU}
    assert activations(load_clip("ViT-B-16-quickgelu", "silent").model) == {QuickGELU}
    assert len(tags) == 3


def test_every_tag_has_the_activation_that_it_or_its_architecture_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of roberta-ViT-B-32, the architecture alone says that it is QuickGELU."""
    built: dict[tuple[str, str], bool] = {}

    def build(architecture: str, *_: Any, quick_gelu: bool, **__: Any) -> Any:
        built[architecture, tag] = quick_gelu
        return nn.Module(), {}, None

    monkeypatch.setattr(loading, "_published", build)
    monkeypatch.setattr(loading, "_download_weights", lambda *_: tmp_path / "weights")
    monkeypatch.setattr(loading.formats, "read_tensors", lambda _: {})
    expected = {}
    for architecture, tag in open_clip.list_pretrained():
        loading.load_parts(architecture, tag, None)
        config = open_clip.get_model_config(architecture)
        says = open_clip.get_pretrained_cfg(architecture, tag).get("quick_gelu", config.get("quick_gelu", False))
        expected[architecture, tag] = bool(says)
    assert built == expected
    assert built["roberta-ViT-B-32", "laion2b_s12b_b32k"]
    assert len(built) > 150


def test_preprocessing_is_the_tags(tags: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(published._PRETRAINED["ViT-B-16"], "halves", {"mean": (0.5,) * 3, "std": (0.25,) * 3})
    monkeypatch.setitem(published._PRETRAINED["ViT-B-16"], "linear", {"interpolation": "bilinear", "url": "x"})
    assert load_clip("ViT-B-16", "halves").preprocessing.mean == (0.5, 0.5, 0.5)
    assert load_clip("ViT-B-16", "halves").preprocessing.std == (0.25, 0.25, 0.25)
    assert load_clip("ViT-B-16", "linear").preprocessing.interpolation == "bilinear"
    assert load_clip("ViT-B-16", "openai").preprocessing.mean == pytest.approx(open_clip.OPENAI_DATASET_MEAN)
    assert tags


def test_preprocessing_of_a_file(
    state: files.State, registered: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """As next to the file; or that of all tags of the architecture; or OpenAI's, with a warning."""
    name = registered("Tiny-8", {**files.CONFIG, "quick_gelu": True})
    path = str(files.save_pickle(state, tmp_path / "w.pt"))
    halves, openai = (0.5,) * 3, pytest.approx(open_clip.OPENAI_DATASET_MEAN)
    assert load_clip(name, path).preprocessing.mean == openai
    monkeypatch.setitem(published._PRETRAINED, "Tiny-8", {"a": {"mean": halves}, "b": {"mean": halves}})
    assert load_clip(name, path).preprocessing.mean == halves
    assert not caplog.text
    monkeypatch.setitem(published._PRETRAINED, "Tiny-8", {"a": {"mean": halves}, "b": {}})
    assert load_clip(name, path).preprocessing.mean == openai
    assert "put the open_clip_config.json of the weights next to the file" in caplog.text
    other = files.save_open_clip(state, tmp_path / "folder") / "open_clip_model.safetensors"
    assert list(load_clip(name, str(other)).preprocessing.mean) == files.PREPROCESS["mean"]
    assert list(load_clip(str(other), "gelu").preprocessing.std) == files.PREPROCESS["std"]


def test_prompts_do_not_load_with_another_preprocessing(state: files.State, tmp_path: Path) -> None:
    folder = files.save_open_clip(state, tmp_path / "folder")
    method = build_method({"name": "coop", "prompt_length": 2}, load_clip(str(folder)), ["cat", "dog"])
    save_prompts(tmp_path / "prompts.safetensors", method)
    alone = str((folder / "open_clip_model.safetensors").rename(tmp_path / "w.safetensors"))
    with pytest.raises(CheckpointError, match=r"learned on images with .*'mean': .*open_clip_config.json next to"):
        load_prompts(tmp_path / "prompts.safetensors", load_clip(alone, method.backbone.activation))


def test_names_as_openai_writes_them() -> None:
    assert is_architecture("ViT-L/14@336px")
    assert not is_hub_id("ViT-L/14@336px")
    with pytest.raises(BackboneError, match="unknown CLIP 'ViT-X/14@336px'"):
        load_clip("ViT-X/14@336px")


def test_a_device_that_is_not_there() -> None:
    with pytest.raises(BackboneError, match=r"device 'xpu' cannot be used: .*use device='cpu'"):
        load_clip("maple-small", device="xpu")


def test_failed_download_of_a_tag(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(_: Any) -> str:
        raise FileNotFoundError("Failed to download file (x)\nlong tail")

    monkeypatch.setattr(loading, "download_pretrained", download)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [])  # whether or not there is a network here
    with pytest.raises(
        BackboneError,
        match=r"RN50 / openai cannot .*Failed.*/timm/resnet50_clip\.openai/resolve/main/open_.*pretrained=FILE",
    ):
        load_clip("RN50")


def test_any_other_failure_of_a_download_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(_: Any) -> str:
        raise ZeroDivisionError

    monkeypatch.setattr(loading, "download_pretrained", download)
    with pytest.raises(ZeroDivisionError):
        load_clip("RN50")


@pytest.mark.parametrize("name", STANDARD)
def test_sizes_of_the_standard_models(name: str) -> None:
    """The towers read every size from the model; on the meta device, for its weight is not needed."""
    size, vision_width, vision_depth, text_width, text_depth, embed, patches = STANDARD[name]
    with torch.device("meta"):
        model = open_clip.CLIP(**open_clip.get_model_config(name))
        text, image = text_tower(model, torch.float32), image_tower(model, torch.float32)
        assert (image.width, image.depth, image.obstacle) == (vision_width, vision_depth, None)
        assert (text.width, text.depth, text.obstacle, text.context_length) == (text_width, text_depth, None, 77)
        states = image.embed(torch.zeros(2, 3, size, size))
        assert states.shape == (2, patches + 1, vision_width)
        states = image.block(vision_depth - 1, image.enter(states))
        assert image.finish(states).shape == (2, embed)
        words = text.enter(text.embed(torch.zeros(2, 9, dtype=torch.int64)))
        assert text.finish(text.block(text_depth - 1, words)[:, 0]).shape == (2, embed)


def test_a_standard_model_for_real() -> None:
    backbone = load_clip("ViT-B-32", "random:4")
    assert (backbone.embed_dim, backbone.preprocessing.size) == (512, 224)
    assert backbone.parameter_count == 151_277_313
    with torch.no_grad():
        assert backbone.image.plain(torch.zeros(1, 3, 224, 224)).shape == (1, 512)


def test_weights_arrive_without_drawing_random_ones(state: files.State, tmp_path: Path, registered: Any) -> None:
    """Nothing of the initialisation is left, though it is skipped: every tensor comes from the file."""
    name = registered("Tiny-8", files.changed(vision={"ls_init_value": 0.1}, quick_gelu=False))
    model = files.shaken(open_clip.create_model(name, load_weights=False))
    path = files.save_safetensors(dict(model.state_dict()), tmp_path / "w.safetensors")
    loaded = load_clip(name, str(path)).model.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in model.state_dict().items())
    assert state.keys() < loaded.keys()


def test_positions_of_another_length_are_resized_only_for_what_open_clip_publishes(
    tags: list[Any], registered: Any, tmp_path: Path
) -> None:
    registered("ViT-B-16", files.changed(vision={"image_size": 48}))
    assert load_clip("ViT-B-16", "openai").preprocessing.size == 48
    with pytest.raises(BackboneError, match=r"positional_embedding \(17, 128\) instead of \(37, 128\)"):
        load_clip("ViT-B-16-gelu", str(tmp_path / "weights.safetensors"))
    assert tags


def test_the_tiny_architecture_is_random_only() -> None:
    assert load_clip("maple-tiny").fingerprint == load_clip("maple-tiny", "random:0").fingerprint
    with pytest.raises(BackboneError, match="unknown pretrained of maple-tiny 'openai'; choose one of: random"):
        load_clip("maple-tiny", "openai")
