"""Sentences cut in a shared beginning and packed ends, in pieces too: features and gradients of the whole blocks."""

from collections.abc import Sequence
from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from maple.clip import Backbone, LayerEdit, prompt_edits
from maple.prompts import encode
from maple.prompts.encode import encode_image, encode_text
from maple.prompts.splice import Position, bucket_stops, write_sentences

NAMES = ("river", "highway or road", "annual crop land with a very long name", "forest")


def closed(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every block run whole, as one that is built otherwise."""
    for block in (*backbone.text._blocks, *backbone.image._blocks):
        monkeypatch.setattr(block, "is_standard", False)


def features_and_gradients(
    backbone: Backbone, position: Position, shapes: Sequence[tuple[int, ...]], limit: int | None = None
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    width = backbone.text.width
    prompts = [torch.randn(*shape, width, generator=generator, dtype=backbone.dtype) for shape in shapes]
    for prompt in prompts:
        prompt.requires_grad_()
    sentences = write_sentences(backbone, NAMES, prompt_length=4, position=position)
    features = encode_text(backbone.text, sentences, prompt_edits(prompts), limit)
    (features * torch.randn(features.shape, generator=generator, dtype=features.dtype)).sum().backward()
    return [features.detach(), *(prompt.grad for prompt in prompts if prompt.grad is not None)]


@pytest.mark.parametrize("position", ["end", "middle", "front"])
@pytest.mark.parametrize(
    "shapes",
    [[(4,)], [(4,), (4,), (4,)], [(4, 4)], [(4, 4), (4, 4)], [(3, 1, 4)], [(1, 1, 4)]],
    ids=["one", "deep", "per class", "per class, deep", "three groups", "one group"],
)
def test_parts_equal_the_whole(
    position: Position, shapes: list[tuple[int, ...]], double_backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = features_and_gradients(double_backbone, position, shapes)
    assert len(parts) == 1 + len(shapes)
    closed(double_backbone, monkeypatch)
    for part, whole in zip(parts, features_and_gradients(double_backbone, position, shapes), strict=True):
        torch.testing.assert_close(part, whole, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("position", ["end", "middle", "front"])
@pytest.mark.parametrize("shapes", [[(4,)], [(4,), (4,)], [(4, 4)], [(3, 1, 4)]], ids=["one", "deep", "own", "groups"])
@pytest.mark.parametrize("limit", [1, 10**6, 10**7])
def test_pieces_equal_the_whole(
    limit: int, position: Position, shapes: list[tuple[int, ...]], double_backbone: Backbone
) -> None:
    """Under a memory limit sentences come in pieces (one each, for a limit of one byte), computed again backwards."""
    pieces = features_and_gradients(double_backbone, position, shapes, limit)
    whole = features_and_gradients(double_backbone, position, shapes)
    for one, other in zip(pieces, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def test_a_memory_limit_keeps_fewer_states(double_backbone: Backbone) -> None:
    """What the graph holds between the two passes, counted in bytes."""
    names = [f"{word} {number}" for number in range(20) for word in ("red", "light blue", "very dark green")]
    sentences = write_sentences(double_backbone, names, prompt_length=4)
    prompt = torch.zeros(4, double_backbone.text.width, dtype=torch.float64, requires_grad=True)

    def kept(limit: int | None) -> int:
        total = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal total
            total += tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            encode_text(double_backbone.text, sentences, prompt_edits([prompt]), limit)
        return total

    assert kept(100_000) < kept(None) / 5


def best_padding(lengths: Sequence[int], most: int) -> int:
    """The fewest rows, by trying every way."""
    ways = [
        cuts
        for runs in range(1, min(most, len(lengths)) + 1)
        for cuts in combinations(range(1, len(lengths)), runs - 1)
    ]
    return min(sum((b - a) * lengths[b - 1] for a, b in pairwise((0, *cuts, len(lengths)))) for cuts in ways)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=9).map(sorted), st.integers(1, 5))
def test_buckets_have_the_least_padding(lengths: list[int], most: int) -> None:
    stops = bucket_stops(lengths, most)
    assert stops == sorted(set(stops))
    assert stops[-1] == len(lengths)
    assert len(stops) <= most
    rows = sum((b - a) * lengths[b - 1] for a, b in pairwise((0, *stops)))
    assert rows == best_padding(lengths, most)


def test_packed_rows_hold_no_padding_for_few_lengths(backbone: Backbone) -> None:
    sentences = write_sentences(backbone, NAMES, prompt_length=4)
    (suffix,) = sentences.split(1, sentences.shared).suffixes
    assert len(suffix.ids) == int((sentences.ends + 1 - sentences.shared).sum())
    assert sorted(suffix.order.tolist()) == list(range(len(NAMES)))


@pytest.mark.parametrize(
    ("names", "position", "shared"),
    [
        (("cat", "dog"), "end", 5),  # SOS and four slots
        (("red cat", "red dog"), "end", 6),
        (("cat", "cat"), "end", 7),  # the whole sentence but EOT
        (("cat",), "end", 7),
        (("cat", "dog"), "middle", 3),
        (("cat", "dog"), "front", 1),
        (("red cat", "red tabby cat"), "middle", 4),
    ],
)
def test_what_is_shared(names: Sequence[str], position: Position, shared: int, backbone: Backbone) -> None:
    sentences = write_sentences(backbone, names, prompt_length=4, position=position)
    assert sentences.shared == shared
    assert sentences.shared <= int(sentences.ends.min())


@pytest.mark.parametrize("depth", [0, 1, 3, 4])
def test_an_image_needs_only_its_first_row_at_the_end(
    depth: int, double_backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(4)
    prompts = [torch.randn(2, double_backbone.image.width, generator=generator).double() for _ in range(depth)]
    images = torch.randn(3, 3, 32, 32, generator=generator).double()
    found = encode_image(double_backbone.image, images, prompt_edits(prompts))
    closed(double_backbone, monkeypatch)
    torch.testing.assert_close(
        found, encode_image(double_backbone.image, images, prompt_edits(prompts)), rtol=1e-9, atol=1e-11
    )


@pytest.mark.parametrize("own", [False, True], ids=["shared", "of each image"])
@pytest.mark.parametrize("count", [0, 1, 4, 7])
def test_images_in_pieces_are_the_whole(
    own: bool, count: int, double_backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    tower, generator = double_backbone.image, torch.Generator().manual_seed(5)
    shape = (count, 2, tower.width) if own else (2, tower.width)
    prompts = [torch.randn(shape, generator=generator).double() for _ in range(3)]
    images = torch.randn(count, 3, 32, 32, generator=generator).double()
    whole = encode_image(tower, images, prompt_edits(prompts))
    seen: list[int] = []
    block = tower.block

    def watched(layer: int, states: Tensor, edit: LayerEdit, *, first_row_only: bool = False) -> Tensor:
        seen.append(len(states))
        return block(layer, states, edit, first_row_only=first_row_only)

    monkeypatch.setattr(tower, "block", watched)
    rows = tower.embed(images[:1]).shape[1] if count else 1
    for at_once in (1, 3):
        seen.clear()
        monkeypatch.setattr(encode, "_ROWS_AT_ONCE", at_once * rows)
        torch.testing.assert_close(encode_image(tower, images, prompt_edits(prompts)), whole, rtol=1e-9, atol=1e-11)
        assert not count or max(seen) <= at_once
    leaves = [prompt.clone().requires_grad_() for prompt in prompts]
    seen.clear()
    torch.testing.assert_close(encode_image(tower, images, prompt_edits(leaves)), whole, rtol=1e-9, atol=1e-11)
    assert set(seen) == {count}, "where a gradient is wanted, all at once"
