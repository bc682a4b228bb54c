"""Every edit of a block, alone and with others: features and gradients of the plain computation, in float64."""

from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import Edit, edited_image_feature, edited_text_feature
from torch import Tensor

from maple.clip import Backbone, LayerEdit, LowRank
from maple.clip.edits import NO_EDIT
from maple.errors import UnsupportedTowerError
from maple.prompts import encode_image, encode_image_and_tokens, encode_text, write_sentences
from maple.prompts.encode import encode_image_with_attention

NAMES = ["cat", "fire_truck", "annual crop land", "supercalifragilistic", "x"]
PROMPT, TOKENS, RANK = 3, 2, 2
PARTS = ["prompt", "late prompt", "tokens", "mixed tokens", "input", "residual", "q", "k", "v", "o", "norm 1", "norm 2"]
PROMPTS = {"prompt", "late prompt"}

layers = st.lists(st.sets(st.sampled_from(PARTS), max_size=4), min_size=1, max_size=3)
few = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Maker:
    """Makes an edit for the package and the same one for the oracle, out of tensors that both differentiate."""

    def __init__(self, width: int, seed: int) -> None:
        self.width, self.generator = width, torch.Generator().manual_seed(seed)
        self.leaves: list[Tensor] = []

    def leaf(self, *shape: int, scale: float = 0.3) -> Tensor:
        tensor = scale * torch.randn(*shape, generator=self.generator, dtype=torch.float64)
        self.leaves.append(tensor.requires_grad_())
        return self.leaves[-1]

    def branch(self) -> Callable[[Tensor], Tensor]:
        down, up = self.leaf(self.width, 4), self.leaf(4, self.width)
        return lambda rows: torch.relu(rows @ down) @ up

    def edit(self, parts: set[str], layer: int, prompt: Tensor | None) -> tuple[LayerEdit, Edit]:
        plain: Edit = {} if prompt is None else {"prompt": prompt}
        if parts & {"tokens", "mixed tokens"}:
            plain |= {"tokens": self.leaf(TOKENS, self.width), "keep": 0.4 if "mixed tokens" in parts else 0.0}
        plain["late"] = "late prompt" in parts
        if "input" in parts and layer == 0:
            plain["input"] = self.branch()
        if "residual" in parts:
            plain["residual"] = self.branch()
        low_rank: dict[Any, LowRank] = {}
        for kind in sorted(parts & set("qkvo")):
            low_rank[kind] = LowRank(self.leaf(RANK, self.width), self.leaf(self.width, RANK), scale=0.7)
            plain[kind] = 0.7 * low_rank[kind].up @ low_rank[kind].down
        affine = [(1 + self.leaf(self.width), self.leaf(self.width)) if norm in parts else None for norm in PARTS[-2:]]
        plain["norms"] = affine
        made = LayerEdit(
            prompt=plain.get("prompt"),
            after_positions="late prompt" in parts,
            tokens=plain.get("tokens"),
            keep=plain.get("keep", 0.0),
            input_residual=plain.get("input"),
            residual=plain.get("residual"),
            low_rank=low_rank,
            norms=(affine[0], affine[1]),
        )
        return made, plain


def gradients(features: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    """Those of a random function of the features."""
    weights = torch.randn(features.shape, generator=torch.Generator().manual_seed(0), dtype=features.dtype)
    return list(torch.autograd.grad((features * weights).sum(), leaves, materialize_grads=True))


def check(features: Tensor, expected: Tensor, leaves: Sequence[Tensor], expected_gradients: list[Tensor]) -> None:
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-11)
    if leaves:
        for found, wanted in zip(gradients(features, leaves), expected_gradients, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)


@few
@given(
    parts=layers,
    names=st.lists(st.sampled_from(NAMES), min_size=1, max_size=3),
    position=st.sampled_from(["end", "middle", "front"]),
    of_each=st.sampled_from(["all", "sentence", "group"]),
    seed=st.integers(0, 99),
)
def test_text(
    double_backbone: Backbone, parts: list[set[str]], names: list[str], position: Any, of_each: str, seed: int
) -> None:
    tower, model = double_backbone.text, double_backbone.model
    maker = Maker(tower.width, seed)
    shape = {"all": (), "sentence": (len(names),), "group": (2, 1)}[of_each]
    made: list[LayerEdit] = []
    plain: list[list[Edit]] = [[] for _ in range(2 * len(names))]  # for each group and name
    for layer, chosen in enumerate(parts):
        prompt = maker.leaf(*shape, PROMPT, tower.width) if chosen & PROMPTS else None
        edit, same = maker.edit(chosen, layer, prompt)
        made.append(edit)
        for place, edits in enumerate(plain):
            group, name = divmod(place, len(names))
            which = {"all": (), "sentence": (name,), "group": (group, 0)}[of_each]
            edits.append(same if prompt is None else {**same, "prompt": prompt[which]})
    in_groups = of_each == "group" and any(chosen & PROMPTS for chosen in parts)
    each = [
        edited_text_feature(model, names[place % len(names)], edits, PROMPT, position=position)
        for place, edits in enumerate(plain[: 2 * len(names) if in_groups else len(names)])
    ]
    expected = torch.stack(each).unflatten(0, (2, -1)) if in_groups else torch.stack(each)
    expected_gradients = gradients(expected, maker.leaves) if maker.leaves else []
    sentences = write_sentences(double_backbone, names, prompt_length=PROMPT, position=position)
    for is_random in (False, True):  # every row of every sentence is computed if the edits draw random numbers
        edits = [LayerEdit(**{**vars(edit), "is_random": is_random}) for edit in made]
        for memory in (None, 1):
            features = encode_text(tower, sentences, edits, memory)
            check(features, expected, maker.leaves, expected_gradients)


@few
@given(parts=layers, seed=st.integers(0, 99))
def test_images(double_backbone: Backbone, parts: list[set[str]], seed: int) -> None:
    tower, model = double_backbone.image, double_backbone.model
    maker = Maker(tower.width, seed)
    images = torch.randn(3, 3, 32, 32, generator=maker.generator, dtype=torch.float64)
    pairs = [
        maker.edit(chosen, layer, maker.leaf(PROMPT, tower.width) if chosen & PROMPTS else None)
        for layer, chosen in enumerate(parts)
    ]
    edits, plain = [edit for edit, _ in pairs], [same for _, same in pairs]
    expected, rows = (
        torch.stack(each) for each in zip(*(edited_image_feature(model, image, plain) for image in images), strict=True)
    )
    expected_gradients = gradients(expected, maker.leaves) if maker.leaves else []
    check(encode_image(tower, images, edits), expected, maker.leaves, expected_gradients)
    with torch.no_grad():  # in pieces
        torch.testing.assert_close(encode_image(tower, images, edits), expected, rtol=0, atol=1e-11)
        features, token_rows = encode_image_and_tokens(tower, images, edits)
        torch.testing.assert_close(features, expected, rtol=0, atol=1e-11)
        torch.testing.assert_close(token_rows, rows, rtol=0, atol=1e-11)
        features, _ = encode_image_with_attention(tower, images, edits)
        torch.testing.assert_close(features, expected, rtol=0, atol=1e-11)


def test_a_prompt_of_each_image_in_pieces(double_backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    tower, maker = double_backbone.image, Maker(double_backbone.image.width, 0)
    images = torch.randn(3, 3, 32, 32, generator=maker.generator, dtype=torch.float64)
    prompt = maker.leaf(3, PROMPT, tower.width)
    edits, plain = zip(*(maker.edit({"q", "residual"}, layer, None) for layer in range(2)), strict=True)
    first = LayerEdit(**{**vars(edits[0]), "prompt": prompt})
    expected = torch.stack(
        [
            edited_image_feature(double_backbone.model, image, [{**plain[0], "prompt": own}, plain[1]])[0]
            for image, own in zip(images, prompt, strict=True)
        ]
    )
    monkeypatch.setattr("maple.prompts.encode._ROWS_AT_ONCE", 1)
    with torch.no_grad():
        torch.testing.assert_close(encode_image(tower, images, [first, edits[1]]), expected, rtol=0, atol=1e-11)


def test_random_numbers_are_drawn_for_each_sentence_and_again_for_the_gradient(double_backbone: Backbone) -> None:
    tower, calls = double_backbone.text, count()
    down = torch.ones(1, tower.width, dtype=torch.float64, requires_grad=True)
    up = torch.ones(tower.width, 1, dtype=torch.float64, requires_grad=True)
    shapes: list[tuple[int, ...]] = []

    def drop(rows: Tensor) -> Tensor:
        next(calls)
        shapes.append(tuple(rows.shape))
        return torch.nn.functional.dropout(rows, 0.5)

    edits = [LayerEdit(low_rank={"v": LowRank(down, up, drop=drop)}, is_random=True)]
    sentences = write_sentences(double_backbone, ["cat", "cat"], prompt_length=2)

    def features_and_gradient(memory: int | None) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        features = encode_text(tower, sentences, edits, memory)
        return features.detach(), gradients(features, [up])[0]

    features, gradient = features_and_gradient(None)
    assert shapes == [(2, 6, tower.width)], "the rows of both sentences, the common ones too"
    assert not torch.allclose(features[0], features[1])
    torch.manual_seed(0)
    step, before = 1e-6, up.detach().clone()
    weights = torch.randn(features.shape, generator=torch.Generator().manual_seed(0), dtype=features.dtype)
    with torch.no_grad():
        up[0] += step
        moved = encode_text(tower, sentences, edits)
        up.copy_(before)
    torch.testing.assert_close(((moved - features) * weights).sum() / step, gradient[0, 0], rtol=1e-4, atol=1e-6)
    in_pieces = features_and_gradient(1)
    again = features_and_gradient(1)
    for first, second in zip(in_pieces, again, strict=True):
        assert torch.equal(first, second)
    assert next(calls) > 5, "pieces are computed again for the gradient"


def test_blocks_of_another_structure(double_backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens and residuals work with any block; what is inside one is refused."""
    text, image = double_backbone.text, double_backbone.image
    sentences = write_sentences(double_backbone, NAMES, prompt_length=PROMPT)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    everything = [{"prompt", "tokens", "input", "residual"}, {"residual"}, {"prompt", "mixed tokens"}]
    results = []
    for is_standard in (True, False):
        for block in (*text._blocks, *image._blocks):
            monkeypatch.setattr(block, "is_standard", is_standard)
        features = []
        for tower, inputs, encode in ((text, sentences, encode_text), (image, images, encode_image)):
            maker = Maker(tower.width, 1)
            edits = [
                maker.edit(parts, layer, maker.leaf(PROMPT, tower.width) if parts & PROMPTS else None)[0]
                for layer, parts in enumerate(everything)
            ]
            features.append(encode(tower, inputs, edits))  # type: ignore[operator]
        results.append(features)
    for standard, other in zip(*results, strict=True):
        torch.testing.assert_close(standard, other, rtol=1e-9, atol=1e-11)
    norms = LayerEdit(norms=((torch.ones(text.width).double(), torch.zeros(text.width).double()), None))
    with pytest.raises(UnsupportedTowerError, match="not standard attention blocks"):
        encode_text(text, sentences, [NO_EDIT, norms])
    for tower in (text, image):
        with pytest.raises(UnsupportedTowerError, match="2SFS changes layers inside the blocks, but block 0 of this"):
            tower.require_standard_blocks("2SFS")
    monkeypatch.undo()
    text.require_standard_blocks("2SFS")


def test_half_precision(backbone: Backbone) -> None:
    """Float32 parameters on states in bfloat16: the result is that of float32, as near as bfloat16 is."""
    maker = Maker(backbone.image.width, 2)
    edits = [maker.edit({"tokens", "residual", "q", "norm 1", "norm 2"}, layer, None)[0] for layer in range(2)]

    def single(value: Any) -> Any:
        return value.detach().float() if isinstance(value, Tensor) else value

    low = {"q": LowRank(single(edits[0].low_rank["q"].down), single(edits[0].low_rank["q"].up))}
    norms = tuple(tuple(map(single, norm)) for norm in edits[0].norms if norm is not None)
    edit = LayerEdit(tokens=single(edits[0].tokens), low_rank=low, norms=norms)  # type: ignore[arg-type]
    states = torch.randn(2, 17, backbone.image.width)
    block = backbone.image._blocks[0]
    exact = block.full(states, edit)
    module = block.module.to(torch.bfloat16)
    try:
        rounded = block.full(states.bfloat16(), edit)
    finally:
        module.float()
    assert rounded.dtype == torch.bfloat16
    assert float((rounded.float() - exact).norm() / exact.norm()) < 0.02
