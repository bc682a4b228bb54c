"""The fast computation equals the plain one, in float64, for random sizes, sentences and prompts."""

from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import image_feature, text_feature
from torch import Tensor

from maple.clip import Backbone
from maple.methods import Method, build_method

NAMES = ["cat", "fire_truck", "annual crop land", "Bmw 3 Series Sedan 2012", "naïve café", "supercalifragilistic", "x"]
WORDS = "a photo of a"

lists_of_names = st.lists(st.sampled_from(NAMES), min_size=1, max_size=3)
few = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def build(description: dict[str, Any], backbone: Backbone, names: Sequence[str], seed: int) -> tuple[Method, Tensor]:
    """A float64 method whose parameters are large enough to matter, and two images."""
    generator = torch.Generator().manual_seed(seed)
    method = build_method(description, backbone, names, generator=generator).double()
    with torch.no_grad():
        for parameter in method.prompt_parameters().values():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return method, torch.randn(2, 3, 32, 32, generator=generator, dtype=torch.float64)


@torch.no_grad()
def check(method: Method, images: Tensor, text: Sequence[Tensor], vision: Sequence[Tensor]) -> None:
    """Compare with the oracle's features; `text` holds a feature per class, or per image and class."""
    model = method.backbone.model
    image_features = torch.stack([image_feature(model, image, vision) for image in images])
    torch.testing.assert_close(method.encode_images(images), image_features, rtol=0, atol=1e-11)
    text_features = torch.stack(list(text))
    if text_features.dim() == 2:
        torch.testing.assert_close(method.encode_classes(), text_features, rtol=0, atol=1e-11)
    expected = method.backbone.logit_scale * (image_features[:, None] * text_features).sum(-1)
    assert expected.dtype == torch.float64
    torch.testing.assert_close(method(images), expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(method.predict_logits(images), expected, rtol=0, atol=1e-9)


@few
@given(
    names=lists_of_names,
    length=st.integers(1, 6),
    depth=st.integers(1, 3),
    words=st.booleans(),
    shared=st.booleans(),
    seed=st.integers(0, 99),
)
def test_maple(
    double_backbone: Backbone, names: list[str], length: int, depth: int, words: bool, shared: bool, seed: int
) -> None:
    init_text = WORDS if words else ""
    method, images = build(
        {
            "name": "maple",
            "prompt_length": length,
            "prompt_depth": depth,
            "init_text": init_text,
            "coupling_sharing": "unified" if shared else "per_layer",
        },
        double_backbone,
        names,
        seed,
    )
    learned = method.prompt_parameters()
    text = [learned[f"text_prompt.{layer}"].detach() for layer in range(depth)]
    vision = []
    for layer, prompt in enumerate(text):
        function = 0 if shared else layer
        vision.append(prompt @ learned[f"coupling.{function}.weight"].T + learned[f"coupling.{function}.bias"])
    written = init_text if length <= 4 else ""
    model = double_backbone.model
    with torch.no_grad():
        check(method, images, [text_feature(model, name, text, written) for name in names], vision)


@few
@given(
    names=lists_of_names,
    lengths=st.tuples(st.integers(0, 5), st.integers(0, 5)).filter(any),
    depths=st.tuples(st.integers(1, 3), st.integers(1, 4)),
    seed=st.integers(0, 99),
)
def test_independent_vl(
    double_backbone: Backbone, names: list[str], lengths: tuple[int, int], depths: tuple[int, int], seed: int
) -> None:
    present = [depth if length else 0 for length, depth in zip(lengths, depths, strict=True)]
    method, images = build(
        {
            "name": "independent_vl",
            "text_prompt_length": lengths[0],
            "vision_prompt_length": lengths[1],
            "text_prompt_depth": present[0],
            "vision_prompt_depth": present[1],
            "init_text": WORDS,
        },
        double_backbone,
        names,
        seed,
    )
    learned = method.prompt_parameters()
    text = [learned[f"text_prompt.{layer}"].detach() for layer in range(present[0])]
    vision = [learned[f"vision_prompt.{layer}"].detach() for layer in range(present[1])]
    written = WORDS if lengths[0] <= 4 else ""
    with torch.no_grad():
        features = [text_feature(double_backbone.model, name, text, written) for name in names]
    check(method, images, features, vision)


@few
@given(
    names=lists_of_names,
    length=st.integers(1, 9),
    position=st.sampled_from(["end", "middle", "front"]),
    specific=st.booleans(),
    seed=st.integers(0, 99),
)
def test_coop(
    double_backbone: Backbone, names: list[str], length: int, position: str, specific: bool, seed: int
) -> None:
    method, images = build(
        {
            "name": "coop",
            "prompt_length": length,
            "class_token_position": position,
            "class_specific": specific,
        },
        double_backbone,
        names,
        seed,
    )
    learned = method.prompt_parameters()["text_prompt.0"].detach()
    each = list(learned) if specific else [learned] * len(names)
    model = double_backbone.model
    with torch.no_grad():
        features = [
            text_feature(model, name, [prompt], position=position) for name, prompt in zip(names, each, strict=True)
        ]
    check(method, images, features, [])


@few
@given(names=lists_of_names, length=st.integers(1, 4), words=st.booleans(), seed=st.integers(0, 99))
def test_cocoop(double_backbone: Backbone, names: list[str], length: int, words: bool, seed: int) -> None:
    init_text = WORDS if words else ""
    method, images = build(
        {"name": "cocoop", "prompt_length": length, "init_text": init_text, "meta_net_reduction": 4},
        double_backbone,
        names,
        seed,
    )
    learned, model = {key: value.detach() for key, value in method.prompt_parameters().items()}, double_backbone.model
    rows = []
    with torch.no_grad():
        for image in images:
            hidden = learned["meta_net.0.weight"] @ image_feature(model, image, []) + learned["meta_net.0.bias"]
            shift = learned["meta_net.1.weight"] @ hidden.clamp(min=0) + learned["meta_net.1.bias"]
            prompt = learned["text_prompt.0"] + shift
            rows.append(torch.stack([text_feature(model, name, [prompt], init_text) for name in names]))
    check(method, images, rows, [])


@few
@given(names=lists_of_names, length=st.integers(1, 4), depth=st.integers(1, 3), seed=st.integers(0, 99))
def test_reversed_maple(double_backbone: Backbone, names: list[str], length: int, depth: int, seed: int) -> None:
    method, images = build(
        {
            "name": "maple",
            "prompt_length": length,
            "prompt_depth": depth,
            "init_text": WORDS,
            "coupling_direction": "vision_to_text",
        },
        double_backbone,
        names,
        seed,
    )
    learned = {key: value.detach() for key, value in method.prompt_parameters().items()}
    vision = [learned[f"vision_prompt.{layer}"] for layer in range(depth)]
    text = [
        prompt @ learned[f"coupling.{layer}.weight"].T + learned[f"coupling.{layer}.bias"]
        for layer, prompt in enumerate(vision)
    ]
    with torch.no_grad():
        features = [text_feature(double_backbone.model, name, text, WORDS) for name in names]
    check(method, images, features, vision)


def test_the_oracle_feels_every_prompt_token(double_backbone: Backbone) -> None:
    """An oracle that ignored a token would agree with an implementation that does."""
    model = double_backbone.model
    generator = torch.Generator().manual_seed(0)
    text = [torch.randn(2, 64, generator=generator, dtype=torch.float64) for _ in range(3)]
    vision = [torch.randn(2, 128, generator=generator, dtype=torch.float64) for _ in range(4)]
    image = torch.randn(3, 32, 32, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        features = text_feature(model, "cat", text, WORDS), image_feature(model, image, vision)
        for row in (row for prompt in [*text, *vision] for row in prompt):
            row.neg_()
            now = text_feature(model, "cat", text, WORDS), image_feature(model, image, vision)
            row.neg_()
            side = 0 if row.shape == (64,) else 1
            assert not torch.allclose(now[side], features[side], atol=1e-6)
            assert torch.equal(now[1 - side], features[1 - side])
