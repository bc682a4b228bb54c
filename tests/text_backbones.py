"""Small CLIPs whose text towers are transformers' own, with tokenizers as these have, and random weights."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import open_clip
import torch
from open_clip.hf_model import HFTextEncoder
from open_clip.tokenizer import HFTokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from tower_families import FAMILIES, SIDE, fill

from maple.clip import Backbone, Preprocessing

LENGTH, WIDTH, DEPTH = 24, 64, 3
_BERT = {
    "hidden_size": WIDTH,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 2,
    "intermediate_size": 96,
}
_WORDS = ["a", "photo", "of", "the", "cat", "dog", "fire", "truck", ".", "X"]
_M2M100 = {
    "d_model": WIDTH,
    "encoder_layers": DEPTH,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 96,
    "decoder_layers": 1,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 96,
}
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertConfig", _BERT),
    "mt5": ("MT5Config", {"d_model": WIDTH, "d_kv": 16, "d_ff": 96, "num_layers": DEPTH, "num_heads": 3}),
    "m2m_100": ("M2M100Config", _M2M100),
}


def _tokenizer(kind: str, folder: Path) -> HFTokenizer:
    """WordPiece for BERT; pieces without a token in front for the others."""
    special: dict[str, str]
    if kind == "bert":
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *_WORDS, "##s"]
        tokenizer = Tokenizer(models.WordPiece({word: row for row, word in enumerate(words)}, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        single, special = "[CLS] $A [SEP]", {"cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
        padding = "[PAD]"
    else:
        padding = "<pad>"
        # M2M100 pads with its second token.
        first = ["<pad>", "</s>", "<unk>"] if kind == "mt5" else ["</s>", "<pad>", "<unk>"]
        words = [*first, *(f"▁{word}" for word in _WORDS), ".", "s", "▁"]
        tokenizer = Tokenizer(models.Unigram([(word, -0.1 * row) for row, word in enumerate(words)], unk_id=2))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        single, special = "$A </s>", {"eos_token": "</s>", "unk_token": "<unk>"}
    ends = [(word, row) for row, word in enumerate(words) if word in special.values()]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=ends)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": padding, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return HFTokenizer(str(folder), context_length=LENGTH)


@cache
def text_backbone(kind: str) -> Backbone:
    """A CLIP with a vision transformer of 4 blocks and a text encoder of 3, which tests share and may not change."""
    import transformers

    config, sizes = _CONFIGS[kind]
    with TemporaryDirectory() as name, torch.random.fork_rng(devices=[]):
        folder = Path(name)
        tokenizer = _tokenizer(kind, folder)
        getattr(transformers, config)(vocab_size=40, **sizes).save_pretrained(folder)
        text = HFTextEncoder(name, output_dim=64, pooler_type="mean_pooler", proj_type="mlp", pretrained=False)
        model = open_clip.CustomTextCLIP(
            embed_dim=64, vision_cfg=FAMILIES["CLIP"]["vision_cfg"], text_cfg={"width": 8, "heads": 1}
        )
    model.text, model.context_length = text, text.context_length
    seen = Preprocessing(SIDE, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    return Backbone(fill(model), name=kind, pretrained=None, preprocessing=seen, tokenizer=tokenizer)
