"""Where prompts sit, and how they start."""

import pytest
import torch
from torch import Tensor

from maple.clip import Backbone, prompt_edits
from maple.errors import ClassNamesError, ConfigError
from maple.prompts import Coupling, encode_image, encode_text, l2_normalize, random_tokens, word_tokens, write_sentences
from maple.prompts.initialise import words_if_short
from maple.prompts.splice import clean_class_names, insert_text, write_rows


def words(backbone: Backbone, text: str) -> list[int]:
    return backbone.word_ids(text)


def test_the_rest_of_the_words_stays(backbone: Backbone) -> None:
    found = write_sentences(backbone, ["fire_truck", "cat"], prompt_length=2, init_text="a photo of a")
    assert found.slots.tolist() == [[1, 2], [1, 2]]
    assert found.ids[0, 1:9].tolist() == [*words(backbone, "a photo of a fire truck."), 49407]
    assert found.ends.tolist() == [8, 7]
    assert found.ids.shape == (2, 9), "cut after the longest sentence"


def test_without_words_there_are_placeholders(backbone: Backbone) -> None:
    found = write_sentences(backbone, ["cat"], prompt_length=3)
    assert found.ids[0, 1:6].tolist() == words(backbone, "X X X cat.")


@pytest.mark.parametrize(
    ("position", "slots"), [("end", [1, 2, 3, 4, 5]), ("middle", [1, 2, 5, 6, 7]), ("front", [3, 4, 5, 6, 7])]
)
def test_positions(position: str, slots: list[int], backbone: Backbone) -> None:
    found = write_sentences(backbone, ["fire truck"], prompt_length=5, position=position)  # type: ignore[arg-type]
    assert found.slots.tolist() == [slots]
    rest = [place for place in range(1, 9) if place not in slots]
    assert found.ids[0, rest].tolist() == words(backbone, "fire truck.")


@pytest.mark.parametrize("bad", [[], "cat", [""], ["cat", "___"], ["cat", None], [b"cat"]])
def test_class_names_that_are_none(bad: object) -> None:
    with pytest.raises(ClassNamesError, match=r"string|empty"):
        clean_class_names(bad)  # type: ignore[arg-type]


def test_put_text_replaces_its_slots_only() -> None:
    states = torch.arange(24.0).reshape(2, 4, 3)
    slots = torch.tensor([[1, 2], [0, 3]])
    shared = insert_text(states, -torch.ones(2, 3), slots)
    assert (shared == -1).all(-1).tolist() == [[False, True, True, False], [True, False, False, True]]
    assert torch.equal(shared[0, 0], states[0, 0])
    each = torch.stack([torch.full((2, 3), -1.0), torch.full((2, 3), -2.0)])
    assert insert_text(states, each, slots)[1, 3].tolist() == [-2, -2, -2]
    assert torch.equal(states, torch.arange(24.0).reshape(2, 4, 3))


def test_vision_tokens_come_last() -> None:
    states, prompt = torch.zeros(2, 3, 4), torch.ones(2, 4)
    longer = write_rows(states, prompt, start=3, replaced=0)
    assert longer.shape == (2, 5, 4)
    replaced = write_rows(longer, 7 * prompt, start=3, replaced=2)
    assert replaced.shape == (2, 5, 4)
    assert replaced[:, :3].abs().sum() == 0
    assert bool((replaced[:, 3:] == 7).all())


def test_no_prompts_is_plain_clip(backbone: Backbone, images: Tensor) -> None:
    plain = backbone.image.plain(images)
    torch.testing.assert_close(encode_image(backbone.image, images, []), plain, rtol=0, atol=1e-5)
    sentences = write_sentences(backbone, ["cat", "a long name of a class"], prompt_length=0, init_text="a photo of a")
    ids = backbone.tokenize(["a photo of a cat.", "a photo of a a long name of a class."])
    torch.testing.assert_close(encode_text(backbone.text, sentences, []), backbone.text.plain(ids), rtol=0, atol=1e-5)


def test_words_as_prompts_are_the_sentence(backbone: Backbone) -> None:
    prompt = word_tokens(backbone, "a photo of a", 4)
    sentences = write_sentences(backbone, ["cat"], prompt_length=4, init_text="a photo of a")
    plain = backbone.text.plain(backbone.tokenize(["a photo of a cat."]))
    torch.testing.assert_close(encode_text(backbone.text, sentences, prompt_edits([prompt])), plain, rtol=0, atol=1e-5)


def test_unit_is_at_least_float32() -> None:
    assert l2_normalize(torch.ones(2, 3, dtype=torch.float16)).dtype == torch.float32
    assert l2_normalize(torch.ones(2, 3, dtype=torch.float64)).dtype == torch.float64


def test_initial_values(backbone: Backbone) -> None:
    tokens = random_tokens(200, 300, generator=torch.Generator().manual_seed(0))
    assert abs(float(tokens.mean())) < 1e-3
    assert float(tokens.std()) == pytest.approx(0.02, rel=0.02)
    assert words_if_short("a photo", 4) == "a photo"
    assert words_if_short("a photo", 5) == ""
    with pytest.raises(ConfigError, match="'a photo' has 2 tokens, fewer than prompt_length=3"):
        word_tokens(backbone, "a photo", 3)


def test_couplings_start_as_the_reference_does() -> None:
    coupling = Coupling(8, 16, 4, "per_layer", torch.Generator().manual_seed(0))
    first, second, third, _ = (function.weight for function in coupling)
    assert torch.equal(second, third)
    assert not torch.equal(first, second)
    assert second.data_ptr() != third.data_ptr()
    assert float(first.detach().abs().max()) <= 8**-0.5
    unified = Coupling(8, 16, 4, "unified", torch.Generator().manual_seed(0))
    assert len(unified) == 1
    assert [token.shape for token in unified.couple([torch.zeros(2, 8)] * 4)] == [(2, 16)] * 4
