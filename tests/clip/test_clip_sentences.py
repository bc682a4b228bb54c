"""Words, special tokens and places for prompts in sentences of every kind of tokenizer."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import clip_files as files
import open_clip
import pytest
from open_clip.tokenizer import HFTokenizer
from test_clip_precision import SEEN
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from maple.clip import Backbone
from maple.errors import BackboneError, ClassNamesError
from maple.prompts import write_sentences

Save = Callable[[Path], None]
LENGTH = 16


def save(folder: Path, tokenizer: Tokenizer, kind: str, **special: str) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind, **special}))


def word_piece(folder: Path) -> None:
    """BERT's: [CLS] ... [SEP] [PAD]."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", ".", "a", "photo", "of", "cat", "fire", "truck", "dog", "##s", "x"]
    tokenizer = Tokenizer(models.WordPiece({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    save(
        folder,
        tokenizer,
        "PreTrainedTokenizerFast",
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )


def byte_pairs(folder: Path) -> None:
    """RoBERTa's: <s> ... </s> <pad>, and words that begin with a space have tokens of their own."""
    letters = sorted({*"abcdefghijklmnopqrstuvwxyzX.", "Ġ"})
    merges = [("Ġ", "X"), ("Ġ", "c"), ("Ġc", "a"), ("Ġca", "t"), ("Ġ", "a"), ("Ġ", "f"), ("Ġ", "t")]
    words = ["<s>", "<pad>", "</s>", "<unk>", *letters, *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    save(folder, tokenizer, "PreTrainedTokenizerFast", pad_token="<pad>", unk_token="<unk>", eos_token="</s>")


def pieces(folder: Path, before: str = "", padding: str = "<pad>", after: str = "", **more: str) -> None:
    """T5's: ... </s> <pad>; SigLIP's pads with </s>; NLLB's has the code of a language in front."""
    words = [
        "<pad>",
        "</s>",
        "<unk>",
        "eng",
        "▁",
        "▁X",
        "▁a",
        "▁photo",
        "▁of",
        "▁cat",
        "▁fire",
        "▁truck",
        "▁dog",
        "s",
        ".",
    ]
    tokenizer = Tokenizer(models.Unigram([(word, -0.1 * number) for number, word in enumerate(words)], unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{before} $A </s> {after}".strip(), special_tokens=[("</s>", 1), ("eng", 3)]
    )
    save(folder, tokenizer, "PreTrainedTokenizerFast", pad_token=padding, unk_token="<unk>", eos_token="</s>", **more)


def siglip(folder: Path) -> None:
    pieces(folder, padding="</s>")


def language(folder: Path) -> None:
    pieces(folder, before="eng")


def language_behind(folder: Path) -> None:
    pieces(folder, after="eng")


TOKENIZERS: dict[str, tuple[Save, int]] = {
    "WordPiece": (word_piece, 1),
    "byte pairs": (byte_pairs, 1),
    "pieces": (pieces, 0),
    "SigLIP": (siglip, 0),
    "language in front": (language, 1),
    "language behind": (language_behind, 0),
}


def backbone_with(save: Save, folder: Path, **options: Any) -> Backbone:
    save(folder)
    tokenizer = HFTokenizer(str(folder), context_length=LENGTH, **options)
    text = {"context_length": LENGTH, "no_causal_mask": True, "pool_type": "last"}
    config = files.changed(text=text)
    model = files.shaken(open_clip.CustomTextCLIP(**config))
    return Backbone(model, name="x", pretrained=None, preprocessing=SEEN, tokenizer=tokenizer)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_words_and_places(name: str, tmp_path: Path) -> None:
    save, first = TOKENIZERS[name]
    backbone = backbone_with(save, tmp_path)
    assert backbone.first_word == first
    assert backbone.word_ids("") == []
    words = backbone.word_ids("a photo of cat")
    row = backbone.tokenize(["a photo of cat"])[0].tolist()
    assert row[first : first + len(words)] == words
    assert len(row) == LENGTH
    for position in ("end", "middle", "front"):
        names = ["cat", "fire truck", "dogs"]
        sentences = write_sentences(backbone, names, prompt_length=4, position=position)  # type: ignore[arg-type]
        assert sentences.ids.shape == (3, LENGTH), "the tower reads padding"
        places = backbone.word_ids(" ".join([backbone.placeholder] * 4))
        assert len(places) == 4
        for class_name, ids, slots in zip(names, sentences.ids, sentences.slots, strict=True):
            assert [int(index) for index in ids[slots]] == places
            rest = [int(index) for number, index in enumerate(ids) if number not in slots]
            written = backbone.tokenize([f"{' '.join([backbone.placeholder] * 4)} {class_name}."])[0].tolist()
            assert rest == written[:first] + written[first + 4 :], "the others keep their order"
        count = len(backbone.word_ids("X X X X dogs")) - 4
        last = sentences.slots[2].tolist()
        assert (
            last
            == {
                "end": [first, first + 1, first + 2, first + 3],
                "middle": [first, first + 1, first + 2 + count, first + 3 + count],
                "front": [first + count + number for number in range(4)],
            }[position]
        )


def test_initial_words(tmp_path: Path) -> None:
    backbone = backbone_with(word_piece, tmp_path)
    sentences = write_sentences(backbone, ["cat"], prompt_length=2, init_text="a photo of a")
    assert sentences.slots.tolist() == [[1, 2]]
    assert backbone.token_texts(backbone.word_ids("photo cat")) == ["photo", "cat"]


SPECIAL = {"WordPiece": 2, "byte pairs": 2, "pieces": 1, "SigLIP": 1, "language in front": 2, "language behind": 2}
"""The special tokens of a sentence."""
WORD = {name: "X" if name == "byte pairs" else "cat" for name in TOKENIZERS}
"""A word of one token, at the beginning of a sentence too."""


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_sentence_that_just_fits_and_one_that_does_not(name: str, tmp_path: Path) -> None:
    backbone, room = backbone_with(TOKENIZERS[name][0], tmp_path), LENGTH - SPECIAL[name]
    fits, longer = (" ".join([WORD[name]] * count) for count in (room, room + 1))
    assert len(backbone.word_ids(fits)) == room
    with pytest.raises(ClassNamesError, match=rf"needs {LENGTH + 1} tokens, but this CLIP reads at most {LENGTH}"):
        backbone.tokenize([fits, longer])
    with pytest.raises(ClassNamesError, match=rf"needs {LENGTH + 50} tokens"):
        backbone.tokenize([" ".join([WORD[name]] * (room + 50))])


def test_ends_that_look_like_padding(tmp_path: Path) -> None:
    """CLIPA writes [PAD] in place of [SEP]."""
    backbone = backbone_with(word_piece, tmp_path, strip_sep_token=True)
    assert backbone.tokenize(["cat"])[0, :3].tolist() == [2, 8, 0]
    assert (backbone.first_word, backbone.word_ids("cat dog")) == (1, [8, 11])
    assert len(backbone.word_ids(" ".join(["cat"] * 14))) == 14
    with pytest.raises(ClassNamesError, match="needs 17 tokens, but this CLIP reads at most 16"):
        backbone.tokenize([" ".join(["cat"] * 15)])


def test_a_class_token_behind_the_padding(tmp_path: Path) -> None:
    def with_ends(folder: Path) -> None:
        word_piece(folder)
        special = {"pad_token": "[PAD]", "cls_token": "[CLS]", "bos_token": "[UNK]", "eos_token": "[SEP]"}
        (folder / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **special})
        )

    backbone = backbone_with(with_ends, tmp_path, tokenizer_mode="clips")
    assert backbone.tokenize(["cat dog"])[0].tolist() == [1, 8, 11, 3, *[0] * 11, 2]
    assert (backbone.first_word, backbone.word_ids("cat dog"), backbone.word_ids("")) == (1, [8, 11], [])
    assert len(backbone.word_ids(" ".join(["cat"] * 13))) == 13
    sentences = write_sentences(backbone, ["fire truck"], prompt_length=2, position="front")
    assert sentences.ids[0].tolist() == [1, 9, 10, 1, 1, 4, 3, *[0] * 8, 2]
    assert sentences.slots.tolist() == [[3, 4]]
    with pytest.raises(ClassNamesError, match="needs 17 tokens, but this CLIP reads at most 16"):
        backbone.tokenize([" ".join(["cat"] * 14)])


def test_texts_of_tokens(tmp_path: Path) -> None:
    for number, (name, text, texts) in enumerate(
        [
            ("WordPiece", "cat cats", ["cat", "cat", "-s"]),
            ("byte pairs", "a cat", ["-a", "cat"]),
            ("pieces", "cat dogs", ["cat", "dog", "-s"]),
        ]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        backbone = backbone_with(TOKENIZERS[name][0], folder)
        assert backbone.token_texts(backbone.word_ids(text)) == texts
        assert backbone.token_texts([1, 49_000]) == [backbone.token_texts([1])[0], "<49000>"]


def test_padding_in_front_is_refused(tmp_path: Path) -> None:
    def left(folder: Path) -> None:
        pieces(folder, padding_side="left")

    backbone = backbone_with(left, tmp_path)
    with pytest.raises(BackboneError, match="pads sentences in front"):
        backbone.word_ids("cat")
