"""Methods on text towers of transformers with tokenizers of their own: trained, saved, loaded, with other names."""

from pathlib import Path

import pytest
import torch
from text_backbones import text_backbone
from tower_families import images
from variants import NAMES, make

from maple import build_method
from maple.efficiency import plain_flops
from maple.errors import UnsupportedTowerError
from maple.explain.words import nearest_words
from maple.testing import logits_of, trained_and_loaded

METHODS = ["coop-front", "cocoop", "kgcoop", "tcp", "maple", "promptsrc", "dept"]


@pytest.mark.parametrize("kind", ["bert", "mt5"])
@pytest.mark.parametrize("name", METHODS)
def test_promises(name: str, kind: str, tmp_path: Path) -> None:
    backbone, pixels = text_backbone(kind), images(6)
    method = make(name, backbone)
    loaded = trained_and_loaded(method, pixels, tmp_path)
    loaded.set_class_names(["photo", NAMES[0]])
    torch.testing.assert_close(loaded.predict_logits(pixels)[:, 1], logits_of(method, pixels)[:, 0])


@pytest.mark.parametrize(("name", "kind"), [("clip_lora", "bert"), ("clip_lora", "mt5"), ("mma", "bert")])
def test_changes_that_blocks_do_not_permit_are_refused_at_once(name: str, kind: str) -> None:
    reasons = r"(Bert|T5|MT5)\w+\) do not begin with a norm|are transformers' own"
    with pytest.raises(UnsupportedTowerError, match=reasons):
        make(name, text_backbone(kind))


def test_words_near_to_prompts() -> None:
    method = build_method({"name": "coop", "prompt_length": 1, "init_text": "photo"}, text_backbone("bert"), NAMES)
    (token,) = nearest_words(method).sets[""]
    assert token.by_distance[0].word == "photo"


@pytest.mark.parametrize("kind", ["bert", "mt5", "m2m_100"])
def test_operations(kind: str) -> None:
    """Counted by shapes as by running each layer."""
    from maple.efficiency import count_flops

    backbone = text_backbone(kind)
    tower, ids = backbone.text, backbone.tokenize(["cat"])
    states, mask = torch.randn(1, ids.shape[1], tower.width), tower.mask(ids)
    counted = count_flops(lambda: tower.block(0, states, mask=mask))
    assert 2 * tower.multiply_adds(0, ids.shape[1]) == counted
    method = build_method({"name": "coop", "prompt_length": 2}, backbone, NAMES)
    one = build_method({"name": "coop", "prompt_length": 2}, backbone, NAMES[:1])
    assert (plain_flops(method) or 0) - (plain_flops(one) or 0) >= 2 * tower.depth * counted
