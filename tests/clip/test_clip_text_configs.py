"""open_clip folders whose text tower is transformers' own: BiomedCLIP's kind, with a configuration from the hub."""

import json
from pathlib import Path
from typing import Any

import clip_files as files
import open_clip
import pytest
import torch
from safetensors.torch import save_file

from maple.clip import load_clip
from maple.clip.checkpoints.text_configs import TEXT_FOLDER
from maple.errors import BackboneDownloadError, BackboneError, ClassNamesError

NAME = "lab/bert"
BERT: dict[str, Any] = {
    "model_type": "bert",
    "vocab_size": 60,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 40,
    "type_vocab_size": 2,
    "pad_token_id": 0,
}
CONFIG: dict[str, Any] = {
    "embed_dim": 48,
    "vision_cfg": {
        "timm_model_name": "test_vit",
        "timm_model_pretrained": False,
        "timm_pool": "",
        "timm_proj": "linear",
        "image_size": 160,
    },
    "text_cfg": {
        "hf_model_name": NAME,
        "hf_tokenizer_name": NAME,
        "hf_proj_type": "mlp",
        "hf_pooler_type": "cls_last_hidden_state_pooler",
        "context_length": 20,
    },
}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz", "photo", "of", "x", "##ray", "."]
SENTENCES = ["a photo of xray.", "X-ray of a photo", "a"]


@pytest.fixture(scope="module")
def biomed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder as open_clip's authors push one, with BERT's tokenizer and without the text tower's configuration."""
    from transformers import BertTokenizer

    folder, text = tmp_path_factory.mktemp("biomed"), tmp_path_factory.mktemp("text")
    (text / "config.json").write_text(json.dumps(BERT))
    described = {**CONFIG["text_cfg"], "hf_model_name": str(text), "hf_model_pretrained": False}
    model = files.shaken(open_clip.CustomTextCLIP(**{**CONFIG, "text_cfg": described}))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG, "preprocess_cfg": {}}))
    BertTokenizer({word: number for number, word in enumerate(WORDS)}).save_pretrained(folder)
    return folder, model


def copied(folder: Path, target: Path) -> Path:
    target.mkdir(parents=True)
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def given(folder: Path, **changes: Any) -> Path:
    """The folder with the configuration of its text tower in it."""
    (folder / TEXT_FOLDER).mkdir(exist_ok=True)
    (folder / TEXT_FOLDER / "config.json").write_text(json.dumps({**BERT, **changes}))
    return folder


def agree(backbone: Any, model: Any) -> None:
    images, ids = files.images(160), backbone.tokenize(SENTENCES)
    with torch.no_grad():
        pairs = (
            (backbone.image.plain(images), model.encode_image(images)),
            (backbone.text.plain(ids), model.encode_text(ids)),
        )
    for features, expected in pairs:
        assert expected.std() > 0.01
        assert (features - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_folder_with_its_text_configuration(biomed: tuple[Path, Any], tmp_path: Path) -> None:
    folder = given(copied(biomed[0], tmp_path / "m"))
    backbone = load_clip(str(folder))
    agree(backbone, biomed[1])
    ids = backbone.tokenize(SENTENCES)
    assert ids.shape == (3, 20)
    assert [WORDS[number] for number in ids[0, :8]] == ["[CLS]", "a", "photo", "of", "x", "##ray", ".", "[SEP]"]
    with pytest.raises(ClassNamesError, match="needs 22 tokens"):
        backbone.tokenize(["a " * 20])


def test_a_repository_fetches_the_configuration_alone(hub: Any, biomed: tuple[Path, Any]) -> None:
    copied(biomed[0], hub.root / "lab" / "biomed")
    text = hub.root / "lab" / "bert"
    text.mkdir(parents=True)
    evil = {"auto_map": {"AutoModel": "evil.Evil"}, "attn_implementation": "lab/evil", "architectures": ["Evil"]}
    (text / "config.json").write_text(json.dumps({**BERT, **evil}))
    for name in ("evil.py", "model.safetensors", "pytorch_model.bin", "tokenizer.json"):
        (text / name).write_text("raise SystemExit")
    backbone = load_clip("hf-hub:lab/biomed")
    agree(backbone, biomed[1])
    assert {line.split("/")[-1] for line in hub.asked if "/lab/bert/" in line} == {"config.json"}
    config = backbone.model.text.config.to_dict()
    assert "auto_map" not in config
    assert config.get("architectures") is None


def test_a_folder_fetches_the_configuration_alone(
    hub: Any, biomed: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied(biomed[0], tmp_path / "m")
    (tmp_path / "lab" / "bert").mkdir(parents=True)  # of that name here: it is not what the description means
    (tmp_path / "lab" / "bert" / "config.json").write_text(json.dumps({**BERT, "hidden_size": 8}))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BackboneDownloadError, match=rf"text tower lab/bert .*{TEXT_FOLDER} next to open_clip_config"):
        load_clip(str(folder))
    (hub.root / "lab" / "bert").mkdir(parents=True)
    (hub.root / "lab" / "bert" / "config.json").write_text(json.dumps(BERT))
    agree(load_clip(str(folder)), biomed[1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "evil"}, r"unknown model_type 'evil'; choose one of: roberta, .*bert"),
        ({"model_type": ["bert"]}, r"unknown model_type"),
        ({"num_hidden_layers": 10**6}, r"does not fit its description"),
        ({"num_hidden_layers": 10**9}, r"num_hidden_layers is 1000000000"),
        ({"hidden_size": "64"}, r"hidden_size is '64'; a whole number is required"),
        ({"vocab_size": 10**7}, r"does not fit its description"),
        ({"type_vocab_size": 10**7}, r"does not fit its description"),
        ({"num_attention_heads": 7}, r"cannot be built"),
        ({"num_hidden_layers": 3}, r"missing: text.transformer.encoder.layer.2"),
    ],
)
def test_configurations_that_are_refused(
    biomed: tuple[Path, Any], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    folder = given(copied(biomed[0], tmp_path / "m"), **changes)
    with pytest.raises(BackboneError, match=message):
        load_clip(str(folder))


@pytest.mark.parametrize("name", ["../bert", "/bert", "a/b/c", "hf-hub:lab/bert", ".", "a b", "x/" + "y" * 100, 7])
def test_a_text_tower_is_a_model_of_the_hub(biomed: tuple[Path, Any], tmp_path: Path, name: Any) -> None:
    folder = copied(biomed[0], tmp_path / "m")
    changed = {**CONFIG, "text_cfg": {**CONFIG["text_cfg"], "hf_model_name": name}}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": changed}))
    with pytest.raises(BackboneError, match=r"hf_model_name is .*must be a model of the hub, NAME or OWNER/NAME"):
        load_clip(str(folder))
