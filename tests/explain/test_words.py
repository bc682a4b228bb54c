"""Nearest words."""

import pytest
import torch
from variants import NAMES, make

from maple.clip import Backbone
from maple.errors import ConfigError
from maple.explain import nearest_words
from maple.methods import build_method


def test_a_token_that_starts_at_a_word_is_nearest_to_it(backbone: Backbone) -> None:
    found = nearest_words(
        build_method({"name": "maple", "prompt_length": 2, "prompt_depth": 2}, backbone, NAMES), top=3
    )
    (tokens,) = found.sets.values()
    assert [token.by_distance[0].word for token in tokens] == ["a", "photo"]
    assert [token.by_cosine[0].word for token in tokens] == ["a", "photo"]
    assert tokens[0].by_distance[0].value == pytest.approx(0, abs=1e-5)
    assert tokens[0].by_cosine[0].value == pytest.approx(1, abs=1e-5)
    assert found.deeper == 1


def test_both_measures_rank_as_they_say(backbone: Backbone) -> None:
    method = make("coop", backbone)
    token = method.text_prompts()[0][2].detach()
    table = backbone.text.token_embeddings(range(backbone.text.vocabulary_size))
    found = nearest_words(method, top=4).sets[""][2]
    distances = (table - token).norm(dim=1)
    expected = distances.argsort()[:4]
    assert [near.word for near in found.by_distance] == backbone.token_texts(expected.tolist())
    torch.testing.assert_close(torch.tensor([near.value for near in found.by_distance]), distances[expected])
    cosines = [near.value for near in found.by_cosine]
    assert cosines == sorted(cosines, reverse=True)


def test_each_class_has_its_own(backbone: Backbone) -> None:
    found = nearest_words(make("coop-class_specific", backbone), top=1)
    assert list(found.sets) == ["cat", "dog", "fire_truck"]
    assert [one["class"] for one in found.to_json()["sets"]] == ["cat", "dog", "fire_truck"]


def test_what_must_be_known_is_said(backbone: Backbone) -> None:
    record = nearest_words(make("cocoop", backbone)).to_json()
    assert "rarely readable" in record["warning"]
    assert any("Every image shifts" in note for note in record["notes"])
    assert any("2 deeper layers" in note for note in nearest_words(make("maple", backbone)).notes())


@pytest.mark.parametrize("variant", ["zero_shot", "vpt", "clip_adapter", "promptsrc-vpt"])
def test_methods_without_text_tokens(variant: str, backbone: Backbone) -> None:
    with pytest.raises(ConfigError, match="learns no token in the sentence"):
        nearest_words(make(variant, backbone))


@pytest.mark.parametrize("top", [0, 49409])
def test_more_words_than_there_are(top: int, backbone: Backbone) -> None:
    with pytest.raises(ConfigError, match="within 1 and 49,408"):
        nearest_words(make("coop", backbone), top=top)


def test_words_that_its_clip_never_met_are_left_out(backbone: Backbone) -> None:
    method = make("coop-words", backbone)
    table = backbone.model.token_embedding.weight.data
    (photo,) = backbone.word_ids("photo")
    kept = table[photo].clone()
    table[photo] = 0
    try:
        words = {near.word for token in nearest_words(method, top=5).sets[""] for near in token.by_distance}
    finally:
        table[photo] = kept
    assert "photo" not in words


def test_how_tokens_read(backbone: Backbone) -> None:
    ids = backbone.word_ids("uncanny photo")
    assert backbone.token_texts(ids)[-1] == "photo"
    assert backbone.token_texts([49406, 49407]) == ["<start_of_text>", "<end_of_text>"]
    assert "".join(backbone.token_texts(backbone.word_ids("xylophonist"))).replace("-", "") == "xylophonist"
