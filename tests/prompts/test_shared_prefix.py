"""What sentences share is computed once; the features and gradients are those of the whole blocks."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from maple.clip import Backbone
from maple.prompts.encode import encode_image, encode_text
from maple.prompts.splice import Position, write_sentences

NAMES = ("river", "highway or road", "annual crop land with a very long name", "forest")


def closed(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every block run whole, as one that is built otherwise."""
    for block in (*backbone.text._blocks, *backbone.image._blocks):
        monkeypatch.setattr(block, "is_open", False)


def features_and_gradients(backbone: Backbone, position: Position, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    width = backbone.text.width
    prompts = [torch.randn(*shape, width, generator=generator, dtype=backbone.dtype) for shape in shapes]
    for prompt in prompts:
        prompt.requires_grad_()
    sentences = write_sentences(backbone, NAMES, prompt_length=4, position=position)
    features = encode_text(backbone.text, sentences, prompts)
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
    found = encode_image(double_backbone.image, images, prompts)
    closed(double_backbone, monkeypatch)
    torch.testing.assert_close(found, encode_image(double_backbone.image, images, prompts), rtol=1e-9, atol=1e-11)
