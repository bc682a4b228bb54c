"""A tower run stage by stage equals the whole tower, and a tower without stages says why."""

from typing import Any

import clip_files as files
import open_clip
import pytest
import torch
from test_clip_precision import CUSTOM_BLOCKS, MODELS, build

from maple.clip import Backbone, ImageTower, TextTower
from maple.clip.tokenization.tokens import SentenceTokenizer
from maple.clip.towers import image_tower
from maple.errors import BackboneError, ClassNamesError, ImageError, UnsupportedTowerError
from maple.prompts import l2_normalize

WALKED = {
    **MODELS,
    "eos": files.changed(text={"pool_type": "eos", "eos_id": 49407}),
    "eos, custom text": files.changed(custom_text=True, text={"pool_type": "eos", "eos_id": 49407}),
    "average before the norm": files.changed(vision={"pool_type": "avg"}),
    "norm after the pool": files.changed(vision={"final_ln_after_pool": True}),
    "sine positions": files.changed(vision={"pos_embed_type": "sin_cos_2d"}),
    "patch dropout": files.changed(vision={"patch_dropout": 0.5}),
    "another context": files.changed(text={"context_length": 33}),
    "last token": files.changed(custom_text=True, text={"pool_type": "last"}),
    "first token": files.changed(custom_text=True, text={"no_causal_mask": True, "pool_type": "first"}),
    "bidirectional, read at EOT": files.changed(custom_text=True, text={"no_causal_mask": True}),
    "class token": files.changed(custom_text=True, text={"embed_cls": True}),
}


def walk_text(text: TextTower, ids: torch.Tensor) -> torch.Tensor:
    states, mask = text.enter(text.embed(ids)), text.mask(ids)
    for layer in range(text.depth):
        states = text.block(layer, states, mask=mask)
    return text.finish(text.pool(states, ids))


def walk_image(image: ImageTower, inputs: torch.Tensor) -> torch.Tensor:
    states = image.enter(image.embed(inputs))
    for layer in range(image.depth):
        states = image.block(layer, states)
    return image.finish(states)


def tokenize(backbone: Backbone) -> torch.Tensor:
    return files.tokenizer(backbone.text.context_length)(files.SENTENCES)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", WALKED)
def test_steps_make_the_tower(name: str, precision: str) -> None:
    backbone = build(WALKED[name], precision)
    ids, inputs = tokenize(backbone), files.images(backbone.preprocessing.size)
    tolerance = 1e-5 if precision == "fp32" else 2e-2
    with torch.no_grad():
        if backbone.text.obstacle is None:
            expected = backbone.text.plain(ids)
            torch.testing.assert_close(walk_text(backbone.text, ids), expected, rtol=tolerance, atol=tolerance)
        if backbone.image.obstacle is None:
            expected = backbone.image.plain(inputs)
            torch.testing.assert_close(walk_image(backbone.image, inputs), expected, rtol=tolerance, atol=tolerance)
    assert backbone.text.obstacle is None or backbone.image.obstacle is None


@pytest.mark.parametrize("shape", [(2, 3, 16, 24), (2, 1, 32, 32), (3, 32, 32)])
def test_images_of_another_shape_are_named(shape: tuple[int, ...]) -> None:
    backbone = build(WALKED["plain"], "fp32")
    side = backbone.preprocessing.size
    with pytest.raises(
        ImageError, match=rf"images of shape \[{shape[0]}, .*; this CLIP reads \[B, 3, {side}, {side}\]"
    ):
        backbone.image.embed(torch.zeros(shape))


@pytest.mark.parametrize("name", ["plain", "custom text", "eos", "custom blocks"])
def test_text_may_stop_after_its_last_eot(name: str) -> None:
    """What follows EOT is never read: a shorter tensor gives the same features."""
    backbone = build(WALKED[name])
    ids = tokenize(backbone)
    length = int(backbone.text.end_positions(ids).max()) + 1
    assert length < 20
    with torch.no_grad():
        torch.testing.assert_close(walk_text(backbone.text, ids[:, :length]), walk_text(backbone.text, ids))


def test_sizes() -> None:
    backbone = build(files.CONFIG)
    text, image = backbone.text, backbone.image
    assert (text.width, text.depth, text.context_length) == (64, 2, 77)
    assert (image.width, image.depth) == (128, 3)
    assert image.embed(files.images()).shape == (4, 17, 128)
    assert text.embed(tokenize(backbone)).shape == (3, 77, 64)
    assert torch.equal(text.token_embeddings([5, 9]), backbone.model.token_embedding.weight[[5, 9]])


@pytest.mark.parametrize("name", ["plain", "eos"])
def test_end_positions_and_words(name: str) -> None:
    backbone = build(WALKED[name])
    ids = tokenize(backbone)
    ends = backbone.text.end_positions(ids)
    assert [int(row[end]) for row, end in zip(ids, ends, strict=True)] == [49407] * 3
    assert backbone.word_ids("two dogs") == files.tokenizer().encode("two dogs")
    assert backbone.word_ids("") == []


def coca() -> Any:
    with torch.random.fork_rng(devices=[]):
        return open_clip.CoCa(
            embed_dim=64,
            vision_cfg={**files.CONFIG["vision_cfg"], "attentional_pool": True, "output_tokens": True}
            | {"attn_pooler_heads": 2, "attn_pooler_queries": 8},
            text_cfg={**files.CONFIG["text_cfg"], "context_length": 76, "embed_cls": True, "output_tokens": True},
            multimodal_cfg={"context_length": 76, "width": 64, "heads": 1, "layers": 1, "vocab_size": 49408},
        )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_coca(precision: str) -> None:
    model, tokenizer = files.shaken(coca()), files.tokenizer(76)
    seen = build(files.CONFIG).preprocessing
    ids, inputs = tokenizer(files.SENTENCES), files.images()
    with torch.no_grad():
        text = model.encode_text(ids, normalize=True)
        image = model.encode_image(inputs, normalize=True)
    backbone = Backbone(model, name="c", pretrained=None, preprocessing=seen, tokenizer=tokenizer, precision=precision)
    assert backbone.embed_dim == 64
    tolerance = 1e-5 if precision == "fp32" else 2e-2
    with torch.no_grad():
        walked = l2_normalize(walk_text(backbone.text, ids)), l2_normalize(walk_image(backbone.image, inputs))
    torch.testing.assert_close(walked[0], text, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(walked[1], image, rtol=tolerance, atol=tolerance)


def test_single_tokens_of_coca_have_no_features() -> None:
    tower = image_tower(coca(), torch.float32)
    for finish in (
        lambda: tower.project(torch.zeros(1, tower.width)),
        lambda: tower.finish_tokens(torch.zeros(1, 2, tower.width)),
    ):
        with pytest.raises(UnsupportedTowerError, match=r"attention pooling.*single tokens have no features"):
            finish()


@pytest.mark.parametrize(
    ("name", "what"),
    [("ResNet", "a ModifiedResNet"), ("timm, convolutions", "timm's EfficientNet")],
)
def test_image_obstacles(name: str, what: str) -> None:
    backbone = build(MODELS[name])
    assert (backbone.image.width, backbone.image.depth) == (0, 0)
    backbone.text.require_promptable("CoOp")
    message = f"MaPLe puts prompts into the image tower, but its image tower is {what}.*a method without image prompts"
    with pytest.raises(UnsupportedTowerError, match=message):
        backbone.image.require_promptable("MaPLe")
    with torch.no_grad():
        size = backbone.preprocessing.size
        expected = backbone.model.encode_image(files.images(size))
        assert torch.equal(backbone.image.plain(files.images(size)), expected)


def test_text_obstacles() -> None:
    custom = {**CUSTOM_BLOCKS, "embed_cls": True}
    backbone = build(files.changed(custom_text=True, text=custom))
    with pytest.raises(UnsupportedTowerError, match=r"CoOp puts prompts into the text tower, but .*masks padding"):
        backbone.text.require_promptable("CoOp")
    backbone.image.require_promptable("a vision method")
    assert backbone.embed_dim == 64


def test_a_sentence_that_just_fits_and_one_that_does_not() -> None:
    backbone = build(files.CONFIG)
    fits, longer = " ".join(["cat"] * 75), " ".join(["cat"] * 76)
    ids = backbone.tokenize(["a cat", fits])
    assert ids.shape == (2, 77)
    assert ids.dtype == torch.int64
    assert int(ids[1, -1]) == 49407
    with pytest.raises(ClassNamesError, match=r"'cat cat.*needs 78 tokens, but this CLIP reads at most 77; shorten"):
        backbone.tokenize(["a cat", longer])


def test_a_class_name_of_many_words_is_named() -> None:
    backbone = build(files.changed(text={"context_length": 10}))
    backbone._tokenizer = SentenceTokenizer(files.tokenizer(10), "x")
    with pytest.raises(ClassNamesError, match="'a photo of a very long name of an animal' needs 12 tokens"):
        backbone.tokenize(["a photo of a very long name of an animal"])


def test_non_square_images_are_refused() -> None:
    from maple.clip.backbone import preprocessing_of

    with pytest.raises(BackboneError, match=r"images of \(32, 64\) pixels; only square"):
        preprocessing_of({"size": (32, 64), "mean": (0, 0, 0), "std": (1, 1, 1)})
