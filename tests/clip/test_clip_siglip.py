"""SigLIP, SigLIP 2 and MetaCLIP 2 in transformers' format: the features and sentences of transformers itself."""

import json
from pathlib import Path
from typing import Any

import clip_files as files
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor

from maple.clip import load_clip
from maple.clip.checkpoints.configurations import sentence_limit, tower_depths
from maple.errors import BackboneError, ClassNamesError

SENTENCES = [
    "A Photo of a_cat, it's!",
    "the  image\tof two DOGS;",
    "",
    "naïve photo \N{SNOWMAN} \N{SNOWMAN} x\N{SUPERSCRIPT TWO}",
]
WORDS = ["▁a", "▁photo", "▁of", "▁the", "▁image", "▁cat", "s", "▁its", "▁two", "▁dogs", "acat", "t", "▁na", "ive", "▁x"]
LETTERS = [f"{space}{letter}" for space in ("▁", "") for letter in "abcdefghijklmnopqrstuvwxyz2_'!,;ABCDEFGHIJKLMNOP"]
PIECES = list(dict.fromkeys(["<pad>", "</s>", "<unk>", "▁", *WORDS, *LETTERS]))
SIZES = {"hidden_size": 64, "intermediate_size": 97, "num_hidden_layers": 2, "num_attention_heads": 2}


def save_spiece(folder: Path) -> None:
    """A spiece.model of SigLIP's kind, and the tokenizer_config.json that names its class."""
    from transformers.convert_slow_tokenizer import import_protobuf

    model = import_protobuf().ModelProto()
    for number, piece in enumerate(PIECES):
        model.pieces.add(piece=piece, score=-0.1 * number, type=2 if piece == "<unk>" else 3 if number < 2 else 1)
    model.trainer_spec.unk_id, model.trainer_spec.model_type = 2, 1
    (folder / "spiece.model").write_bytes(model.SerializeToString())
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "SiglipTokenizer"}))


def save_unigram(folder: Path, kind: str, special: dict[str, str]) -> None:
    """A tokenizer.json of sentence pieces under the class `kind` of transformers."""
    tokenizer = Tokenizer(models.Unigram([(piece, -0.1 * number) for number, piece in enumerate(PIECES)], unk_id=2))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind, **special}))


def save_gemma(folder: Path) -> None:
    """SigLIP 2's kind of tokenizer: Gemma's, with an end and without a beginning."""
    from transformers import GemmaTokenizer

    letters = [" ", "▁", *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ'!,;_"]
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *letters, "ca", "cat", "ph"]
    vocabulary = {word: number for number, word in enumerate(words)}
    merges = [("c", "a"), ("ca", "t"), ("p", "h")]
    tokenizer = GemmaTokenizer(vocab=vocabulary, merges=merges, padding_side="right", add_bos_token=False)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder that transformers wrote, and its model: towers of different widths, depths and head counts."""
    from transformers import SiglipConfig, SiglipImageProcessor, SiglipModel

    folder = tmp_path_factory.mktemp("siglip")
    special = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 1}
    text = {**SIZES, **special, "vocab_size": 160, "projection_size": 128, "num_hidden_layers": 3}
    vision = {**SIZES, "hidden_size": 128, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
    model = files.shaken(SiglipModel(SiglipConfig(text_config=text, vision_config=vision)))
    model.save_pretrained(folder)
    SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    save_spiece(folder)
    return folder, model


def copied(folder: Path, target: Path, **changes: Any) -> Path:
    """The folder again, with other values in config.json; a mapping changes values inside a tower's."""
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    config = json.loads((target / "config.json").read_text())
    for key, value in changes.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    (target / "config.json").write_text(json.dumps(config))
    return target


def agree(backbone: Any, model: Any) -> None:
    """Features equal those of transformers, relative to the largest entry."""
    images, ids = files.images(), backbone.tokenize(SENTENCES)
    with torch.no_grad():
        expected = model.get_image_features(pixel_values=images), model.get_text_features(input_ids=ids)
        given = backbone.image.plain(images), backbone.text.plain(ids)
    for features, output in zip(given, expected, strict=True):
        wanted: Tensor = output if isinstance(output, Tensor) else output.pooler_output
        assert wanted.std() > 0.05
        assert (features - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert backbone.logit_scale == pytest.approx(model.logit_scale.exp().item())


def test_siglip_folder(siglip: tuple[Path, Any]) -> None:
    folder, model = siglip
    backbone = load_clip(str(folder))
    agree(backbone, model)
    assert backbone.model.logit_bias.item() == 2.5
    assert (backbone.embed_dim, backbone.activation) == (128, "gelu")
    seen = backbone.preprocessing
    assert (seen.size, seen.resize, seen.mean) == (32, "squash", (0.5, 0.5, 0.5))
    assert tower_depths(str(folder)) == (3, 2)
    assert sentence_limit(str(folder)) is None


def test_sharded_and_legacy_weights(siglip: tuple[Path, Any], tmp_path: Path) -> None:
    folder = copied(siglip[0], tmp_path / "m")
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    halves = {f"part-{n}.safetensors": dict(list(state.items())[n::2]) for n in range(2)}
    for name, part in halves.items():
        save_file(part, folder / name)
    index = {"weight_map": {key: name for name, part in halves.items() for key in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    sharded = load_clip(str(folder)).fingerprint
    (folder / "model.safetensors.index.json").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    assert load_clip(str(folder)).fingerprint == sharded == load_clip(str(siglip[0])).fingerprint


def test_each_activation_and_norm_is_its_towers_own(siglip: tuple[Path, Any], tmp_path: Path) -> None:
    from transformers import SiglipModel

    changes = {"text_config": {"hidden_act": "gelu"}, "vision_config": {"layer_norm_eps": 0.1}}
    folder = copied(siglip[0], tmp_path / "m", **changes)
    agree(load_clip(str(folder)), SiglipModel.from_pretrained(folder).eval())


def test_siglip_repository(hub: Any, siglip: tuple[Path, Any]) -> None:
    (hub.root / "lab").mkdir(parents=True)
    copied(siglip[0], hub.root / "lab" / "siglip")
    agree(load_clip("hf-hub:lab/siglip"), siglip[1])


def test_sentences_are_those_of_siglip(siglip: tuple[Path, Any], tmp_path: Path) -> None:
    """Lower case, no punctuation, an end, and padding by the same token; compared by hand with `SiglipTokenizer`."""
    backbone = load_clip(str(siglip[0]))
    ids = backbone.tokenize(SENTENCES)
    assert ids.shape == (4, 64)
    pieces = [[PIECES[number] for number in row.tolist() if number != 1] for row in ids]
    assert pieces[0] == ["▁a", "▁photo", "▁of", "▁", "acat", "▁its"]
    assert pieces[1] == ["▁the", "▁image", "▁of", "▁two", "▁dogs"]
    assert pieces[2] == []
    assert pieces[3][-3:] == ["<unk>", "▁x", "<unk>"], "without a table of its own, no character is normalised"
    assert (ids[:, -1] == 1).all()
    with pytest.raises(ClassNamesError, match="needs 65 tokens"):
        backbone.tokenize(["cat " * 64])
    folder = copied(siglip[0], tmp_path / "m")
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False}))
    cased = load_clip(str(folder)).tokenize(["A cat"])[0]
    assert PIECES[cased[0]] == "▁A"


@pytest.mark.parametrize("kind", ["siglip", "gemma"])
def test_a_tokenizer_json(siglip: tuple[Path, Any], tmp_path: Path, kind: str) -> None:
    """SigLIP's, cleaned as from spiece.model; and SigLIP 2's, which is Gemma's, in lower case."""
    from transformers import AutoTokenizer

    folder = copied(siglip[0], tmp_path / "m")
    (folder / "spiece.model").unlink()
    if kind == "gemma":
        save_gemma(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        lower = [sentence.lower() for sentence in SENTENCES]  # as SigLIP 2 was trained
        expected = tokenizer(lower, padding="max_length", max_length=64, return_tensors="pt").input_ids
    else:
        save_unigram(folder, "SiglipTokenizer", {})
        expected = load_clip(str(siglip[0])).tokenize(SENTENCES[:3])
    given = load_clip(str(folder)).tokenize(SENTENCES)
    assert torch.equal(given[: len(expected)], expected)
    assert len(given.unique()) > 10


def test_metaclip_2(tmp_path: Path) -> None:
    """CLIP's layout with another vocabulary, whose EOS token has the id 2."""
    from transformers import AutoTokenizer, MetaClip2Config, MetaClip2Model

    both = {**SIZES, "hidden_act": "quick_gelu", "projection_dim": 32}
    text = {**both, "vocab_size": 160, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 3}
    vision = {**both, "hidden_size": 128, "image_size": 32, "patch_size": 8}
    config = MetaClip2Config(text_config=text, vision_config=vision, projection_dim=32)
    model = files.shaken(MetaClip2Model(config))
    model.save_pretrained(tmp_path)
    save_unigram(tmp_path, "PreTrainedTokenizerFast", {"pad_token": "▁", "eos_token": "</s>", "unk_token": "<unk>"})
    path = tmp_path / "tokenizer.json"
    end = {"SpecialToken": {"id": "</s>", "type_id": 0}}
    tokens = {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}}
    single = [{"Sequence": {"id": "A", "type_id": 0}}, end]
    post = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": tokens}
    path.write_text(json.dumps({**json.loads(path.read_text()), "post_processor": post}))
    backbone = load_clip(str(tmp_path))
    agree(backbone, model)
    assert backbone.activation == "quickgelu"
    assert backbone.text.obstacle is None
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    expected = tokenizer(SENTENCES, padding="max_length", max_length=77, return_tensors="pt").input_ids
    assert torch.equal(backbone.tokenize(SENTENCES), expected)


def test_what_cannot_be_followed_is_refused(siglip: tuple[Path, Any], tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"model_type": "siglip2"}, r"SigLIP 2 of variable image sizes \(NaFlex.*siglip2-base-patch16-224"),
        ({"text_config": {"projection_size": 64}}, r"text features of 64 numbers and image features of 128"),
        ({"text_config": {"projection_size": None}}, r"text features of 64 numbers and image features of 128"),
        ({"vision_config": {"vision_use_head": False}}, r"without its pooling head"),
        ({"vision_config": {"hidden_act": "relu"}}, r"hidden_act 'relu'.*gelu_pytorch_tanh"),
        ({"vision_config": {"num_hidden_layers": 3}}, r"missing: visual.trunk.blocks.2"),
        ({"vision_config": {"num_hidden_layers": 10**6}}, r"does not fit its description"),
        ({"vision_config": {"image_size": [32, 64]}}, r"makes images of 32 pixels, but the model reads"),
        ({"vision_config": {"num_attention_heads": 7}}, r"cannot be built"),
        ({"text_config": {"vocab_size": 10}}, r"of another shape: text.token_embedding.weight"),
        ({"text_config": {"hidden_size": "wide"}}, r"does not describe a CLIP"),
    ]
    for number, (changes, message) in enumerate(cases):
        folder = copied(siglip[0], tmp_path / str(number), **changes)
        with pytest.raises(BackboneError, match=message):
            load_clip(str(folder))


def test_damaged_tokenizers(siglip: tuple[Path, Any], tmp_path: Path) -> None:
    folder = copied(siglip[0], tmp_path / "m")
    for name, content, message in (
        ("spiece.model", b"\xff\xfe no model", r"spiece.model is damaged"),
        ("spiece.model", b"", r"spiece.model is damaged|does not have the token"),
        ("tokenizer.json", b"{}", r"tokenizer.json is damaged"),
        ("tokenizer_config.json", b"[1", r"tokenizer_config.json"),
    ):
        before = (folder / name).read_bytes() if (folder / name).exists() else None
        (folder / name).write_bytes(content)
        with pytest.raises(BackboneError, match=message):
            load_clip(str(folder))
        (folder / name).unlink() if before is None else (folder / name).write_bytes(before)
    (folder / "spiece.model").unlink()
    with pytest.raises(BackboneError, match=r"the tokenizer of .* cannot be loaded: .*spiece.model"):
        load_clip(str(folder))


def test_tokens_without_an_embedding(siglip: tuple[Path, Any], tmp_path: Path) -> None:
    """A tokenizer of another model is named, in place of an index error in the middle of a training."""
    folder = copied(siglip[0], tmp_path / "m", text_config={"vocab_size": 60})
    state = load_file(folder / "model.safetensors")
    key = "text_model.embeddings.token_embedding.weight"
    save_file({**state, key: state[key][:60].clone()}, folder / "model.safetensors")
    backbone = load_clip(str(folder))
    with pytest.raises(BackboneError, match=r"has the token \d+, but the model only 60 token embeddings"):
        backbone.tokenize(["q2 z2"])
