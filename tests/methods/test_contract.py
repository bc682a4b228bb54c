"""What every method promises, asked of every method and variant."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from variants import HEADS, LEARNING, NAMES, VARIANTS, WORDS_ONLY, make

from maple.checkpoint import load_prompts, put_parameters, read_prompts, save_prompts
from maple.clip import Backbone
from maple.config import TrainSettings
from maple.data import Batch
from maple.errors import ClassNamesError, ConfigError, UnlearnedClassesError
from maple.methods import Method, method_settings
from maple.train import Trainer
from maple.train.optimization import make_optimizer

LABELS = torch.tensor([0, 1, 2, 0, 1, 2])
every = pytest.mark.parametrize("variant", VARIANTS)
learning = pytest.mark.parametrize("variant", LEARNING)


def values(method: Method) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in method.prompt_parameters().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def logits_of(method: Method, images: Tensor) -> Tensor:
    with torch.no_grad():
        result: Tensor = method(images)
    return result


def losses(method: Method, images: Tensor) -> Iterator[Tensor]:
    """The loss of each stage of a training."""
    for stage in range(len(method.training_stages())):
        method.stage = stage
        loss, logs = method.loss(images, LABELS)
        assert logs.keys() == set(method.log_names)
        yield loss


def train_step(method: Method, images: Tensor) -> None:
    """A step of each stage of a training."""
    for loss in losses(method, images):
        loss.backward()
    make_optimizer(method.prompt_parameters().values(), TrainSettings(lr=0.1)).step()


def trained_and_loaded(method: Method, images: Tensor, folder: Path, *, learns: bool = True) -> Method:
    """A step changes what is learned and nothing of the backbone; saved and loaded, the method predicts the same."""
    backbone = method.backbone
    frozen = {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}
    before, untrained = values(method), logits_of(method, images)
    assert untrained.isfinite().all()
    if learns:
        train_step(method, images)
        assert all(not torch.equal(before[name], value) for name, value in values(method).items())
        assert not torch.equal(logits_of(method, images), untrained)
    assert all(weight.grad is None for weight in backbone.model.parameters())
    assert same(frozen, backbone.model.state_dict())
    save_prompts(folder / "prompts.safetensors", method)
    loaded = load_prompts(folder / "prompts.safetensors", backbone)
    assert torch.equal(logits_of(loaded, images), logits_of(method, images))
    return loaded


@every
def test_shapes_and_unit_norms(variant: str, backbone: Backbone, images: Tensor) -> None:
    method = make(variant, backbone)
    logits = logits_of(method, images)
    assert logits.shape == (6, 3)
    assert logits.dtype == torch.float32
    image_features = method.encode_images(images)
    width = image_features.shape[1]  # other features may follow the unit ones
    torch.testing.assert_close(image_features[:, : backbone.embed_dim].norm(dim=-1), torch.ones(6))
    if method.classes_depend_on_image:
        text_features = method.encode_classes_for(image_features)
        assert text_features.shape == (6, 3, width)
    else:
        text_features = method.encode_classes()
        assert text_features.shape == (3, width)
    if width == backbone.embed_dim:
        torch.testing.assert_close(text_features.norm(dim=-1), torch.ones(text_features.shape[:-1]))


@every
def test_only_prompt_parameters_receive_gradients(variant: str, backbone: Backbone, images: Tensor) -> None:
    method = make(variant, backbone)
    parameters = method.prompt_parameters()
    assert {id(value) for value in parameters.values()} == {id(value) for value in method.parameters()}
    assert bool(parameters) == (variant in LEARNING)
    with torch.no_grad():  # a product whose one factor starts at zero gives the other no gradient
        for parameter in parameters.values():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    stages = method.training_stages()
    for loss in losses(method, images):
        if parameters:
            loss.backward()
        else:
            assert not loss.requires_grad
        learned = {name for name, parameter in parameters.items() if parameter.grad is not None}
        assert learned == {name for stage in stages[: method.stage + 1] for name in stage.parameters}
    for name, parameter in parameters.items():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.abs().sum() > 0), name
        assert parameter.dtype == torch.float32
    assert all(not weight.requires_grad and weight.grad is None for weight in backbone.model.parameters())


@learning
def test_a_step_changes_every_prompt_and_nothing_of_the_backbone(
    variant: str, backbone: Backbone, images: Tensor
) -> None:
    frozen = {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}
    method = make(variant, backbone)
    before = values(method)
    train_step(method, images)
    assert all(not torch.equal(before[name], value) for name, value in values(method).items())
    assert same(frozen, backbone.model.state_dict())


@every
def test_saved_and_loaded_logits_are_the_same_bits(
    variant: str, backbone: Backbone, images: Tensor, tmp_path: Path
) -> None:
    method = make(variant, backbone)
    if variant in LEARNING:
        train_step(method, images)
    save_prompts(tmp_path / "prompts.safetensors", method)
    loaded = load_prompts(tmp_path / "prompts.safetensors", backbone)
    assert type(loaded) is type(method)
    assert loaded.settings == method.settings
    assert loaded.class_names == NAMES
    assert same(values(loaded), values(method))
    assert torch.equal(logits_of(loaded, images), logits_of(method, images))


@every
def test_new_class_names_leave_trained_tensors_alone(variant: str, backbone: Backbone, images: Tensor) -> None:
    method = make(variant, backbone)
    before, old = values(method), logits_of(method, images)
    names = ["owl", "submarine", "cat", "tea", "old castle"]
    if not method.supports_new_classes:
        with pytest.raises(UnlearnedClassesError, match=r"learned for 3 classes, and 'owl' is not one of them; use"):
            method.set_class_names(names)
        names = ["fire_truck", "cat"]
    method.set_class_names(names)
    assert same(before, values(method))
    assert method.class_names == tuple(names)
    if not method.supports_new_classes:
        expected = logits_of(method, images)
        method.set_class_names(["Fire truck", "Cat"])
        torch.testing.assert_close(logits_of(method, images), expected)
        method.set_class_names(names)
    new = logits_of(method, images)
    assert new.shape == (6, len(names))
    torch.testing.assert_close(new[:, names.index("cat")], old[:, 0])
    method.set_class_names(NAMES)
    assert torch.equal(logits_of(method, images), old)


@every
def test_refused_class_names_change_nothing(variant: str, backbone: Backbone, images: Tensor) -> None:
    method = make(variant, backbone)
    before = logits_of(method, images)
    refused: list[Any] = [[], "cat", ["cat", ""], ["cat", 3], ["cat", "_ _"], ["cat", "very " * 80]]
    for names in refused:
        with pytest.raises(ClassNamesError):
            method.set_class_names(names)
        assert method.class_names == NAMES
        assert torch.equal(logits_of(method, images), before)


@every
def test_the_seed_decides(variant: str, backbone: Backbone, images: Tensor) -> None:
    first, again, other = make(variant, backbone), make(variant, backbone), make(variant, backbone, seed=2)
    assert same(values(first), values(again))
    assert torch.equal(logits_of(first, images), logits_of(again, images))
    assert same(values(first), values(other)) == (variant in WORDS_ONLY)


@every
def test_the_global_generator_is_neither_used_nor_changed(variant: str, backbone: Backbone, images: Tensor) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        state = torch.random.get_rng_state()
        one = make(variant, backbone)
        logits_of(one, images)
        assert torch.equal(torch.random.get_rng_state(), state)
        torch.manual_seed(12)
        assert same(values(one), values(make(variant, backbone)))


@learning
def test_loss_falls_on_a_separable_batch(variant: str, backbone: Backbone) -> None:
    generator = torch.Generator().manual_seed(0)
    prototypes = 2 * torch.randn(3, 3, 32, 32, generator=generator)
    batch = Batch(prototypes[LABELS] + 0.1 * torch.randn(6, 3, 32, 32, generator=generator), LABELS)
    trainer = Trainer(make(variant, backbone), TrainSettings(lr=0.01, warmup_epochs=0, epochs=16, schedule="constant"))
    losses = [trainer.run_epoch([(batch, 6)]).loss for _ in range(16)]
    assert min(losses[-3:]) < 0.9 * losses[0]


@learning
def test_a_resumed_training_ends_in_the_same_bits(variant: str, backbone: Backbone, images: Tensor) -> None:
    settings = TrainSettings(lr=0.01, warmup_epochs=0, epochs=3)
    straight, first, second = (Trainer(make(variant, backbone), settings) for _ in range(3))
    for _ in range(3):
        straight.run_epoch([(Batch(images, LABELS), 6)])
    first.run_epoch([(Batch(images, LABELS), 6)])
    second.restore(*first.state())
    for _ in range(2):
        second.run_epoch([(Batch(images, LABELS), 6)])
    assert same(values(second.method), values(straight.method))


@every
def test_a_teacher_is_neither_owned_nor_saved(variant: str, backbone: Backbone, images: Tensor, tmp_path: Path) -> None:
    method = make(variant, backbone)
    method.loss(images, LABELS)
    saved = method.saved_tensors()
    assert len(method.state_dict()) == len(saved)
    assert method.prompt_parameters().keys() <= saved.keys()
    save_prompts(tmp_path / "prompts.safetensors", method)
    assert read_prompts(tmp_path / "prompts.safetensors").tensors.keys() == saved.keys()


@every
def test_predicted_logits_are_those_of_forward(variant: str, backbone: Backbone, images: Tensor) -> None:
    method = make(variant, backbone)
    predicted = method.predict_logits(images)
    torch.testing.assert_close(predicted, logits_of(method, images), rtol=1e-5, atol=1e-5)
    assert not predicted.requires_grad


@every
def test_features_stand_in_for_images_where_the_tower_is_left_alone(
    variant: str, backbone: Backbone, images: Tensor
) -> None:
    method = make(variant, backbone)
    if not method.accepts_features:
        assert method.vision_edits()
        return
    with torch.no_grad():
        features = backbone.image.plain(images)
    torch.testing.assert_close(logits_of(method, features), logits_of(method, images), rtol=1e-5, atol=1e-5)
    loss, logs = method.loss(features, LABELS)
    expected, others = method.loss(images, LABELS)
    torch.testing.assert_close((loss, logs), (expected, others), rtol=1e-4, atol=1e-4)


@every
def test_images_do_not_see_each_other(variant: str, backbone: Backbone, images: Tensor) -> None:
    method = make(variant, backbone)
    torch.testing.assert_close(logits_of(method, images)[2:3], logits_of(method, images[2:3]), rtol=1e-4, atol=1e-4)


@every
def test_one_class(variant: str, backbone: Backbone, images: Tensor) -> None:
    assert logits_of(make(variant, backbone, ["cat"]), images).shape == (6, 1)


@every
def test_equal_names_have_equal_logits(variant: str, backbone: Backbone, images: Tensor) -> None:
    logits = logits_of(make(variant, backbone, ["crane", "cat", "crane"]), images)
    each_learns_its_own = variant in ("coop-class_specific", "promptsrc-class_specific") or variant in HEADS
    assert torch.allclose(logits[:, 0], logits[:, 2], atol=1e-5) != each_learns_its_own


@every
def test_names_in_any_script(variant: str, backbone: Backbone, images: Tensor) -> None:
    names = ["naïve café", "日本語", "Ærøskøbing", "🦉", "St. John's (wort)", "it's"]
    logits = logits_of(make(variant, backbone, names), images)
    assert logits.shape == (6, 6)
    assert bool(logits.isfinite().all())


@every
def test_underscores_are_spaces(variant: str, backbone: Backbone, images: Tensor) -> None:
    one, other = make(variant, backbone, ["cat", "fire_truck"]), make(variant, backbone, ["cat", "fire truck"])
    assert torch.equal(logits_of(one, images), logits_of(other, images))


@every
def test_a_name_too_long_is_named_and_never_cut(variant: str, backbone: Backbone) -> None:
    with pytest.raises(ClassNamesError, match=r"very very.* needs \d+ tokens, but this CLIP reads at most 77; shorten"):
        make(variant, backbone, ["cat", "very " * 80 + "long"])


def counted(method: Method, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    calls = []
    plain = method.encode_classes
    monkeypatch.setattr(method, "encode_classes", lambda: (calls.append(1), plain())[1])
    return lambda: len(calls)


@pytest.mark.parametrize("variant", [name for name in LEARNING if "cocoop" not in name])
def test_class_embeddings_are_cached_until_something_changes(
    variant: str, backbone: Backbone, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = make(variant, backbone)
    calls = counted(method, monkeypatch)

    def renewed(expected: int) -> None:
        for _ in range(2):
            found = method.class_embeddings()
            assert not found.requires_grad
            method.predict_logits(images)
        assert calls() == expected
        assert torch.equal(found, type(method).encode_classes(method))

    renewed(1)
    train_step(method, images)
    before = calls()  # the step encodes the classes on its own
    renewed(before + 1)
    parameter = next(iter(method.prompt_parameters().values()))
    parameter.data.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    renewed(before + 2)
    other = make(variant, backbone, seed=9).saved_tensors()
    put_parameters(method, {name: value.detach().clone() for name, value in other.items()}, source="test")
    renewed(before + 3)
    method.set_class_names(["dog", "cat"])
    renewed(before + 4)
    method.set_class_names(["dog", "cat"])
    renewed(before + 4)


def test_cocoop_has_no_class_embeddings(backbone: Backbone) -> None:
    with pytest.raises(ConfigError, match="depend on the image; use encode_classes_for"):
        make("cocoop", backbone).class_embeddings()


@every
def test_names_set_in_inference_mode_serve_training(variant: str, backbone: Backbone, images: Tensor) -> None:
    method = make(variant, backbone)
    with torch.inference_mode():
        method.set_class_names(["dog", "cat", "fire_truck"])
        method.predict_logits(images)
    loss, _ = method.loss(images, LABELS)
    if variant in LEARNING:
        loss.backward()
    method.predict_logits(images)


@every
def test_methods_describe_themselves(variant: str, backbone: Backbone) -> None:
    method = make(variant, backbone)
    assert method.title
    assert method.paper
    assert method.summary
    assert method.backbone is backbone


@every
def test_a_twin_speaks_of_other_classes_and_shares_what_is_learned(
    variant: str, backbone: Backbone, images: Tensor
) -> None:
    method = make(variant, backbone)
    before = logits_of(method, images)
    names = ["dog", "cat", "fire_truck"] if method.supports_new_classes else ["dog", "cat"]
    twin = method.with_class_names(names)
    with torch.no_grad():
        found, features = twin.predict_logits(images), method.encode_images(images)
        assert torch.equal(twin.logits_of(features), found)
    assert (twin.class_names, method.class_names) == (tuple(names), tuple(NAMES))
    assert torch.equal(logits_of(method, images), before)
    method.set_class_names(names)
    torch.testing.assert_close(found, logits_of(method, images), atol=1e-4, rtol=1e-4)
    own, other = method.prompt_parameters(), twin.prompt_parameters()
    assert own.keys() == other.keys()
    assert all(own[name] is other[name] for name in own)
    if not method.supports_new_classes:
        with pytest.raises(UnlearnedClassesError):
            method.with_class_names(["cat", "submarine"])


@every
def test_a_sweep_is_told_what_the_method_says(variant: str, backbone: Backbone) -> None:
    """Of new classes: a sweep plans by the settings alone, before there is a backbone."""
    _, settings = method_settings(VARIANTS[variant])
    assert settings.supports_new_classes == make(variant, backbone).supports_new_classes


@learning
def test_training_goes_on_after_an_evaluation(variant: str, backbone: Backbone, images: Tensor) -> None:
    """What an evaluation in inference mode has kept serves training, with little memory for text too."""
    method, alone = make(variant, backbone), make(variant, backbone)
    method.limit_text_memory(1)
    with torch.inference_mode():
        method.predict_logits(images)
    for one in (method, alone):
        one.loss(images, LABELS)[0].backward()
    for name, parameter in method.prompt_parameters().items():
        torch.testing.assert_close(parameter.grad, alone.prompt_parameters()[name].grad)


@every
def test_full_precision_outside_the_towers(variant: str, backbone: Backbone, images: Tensor) -> None:
    """Under a caller's own autocast too."""
    method = make(variant, backbone)
    exact, loss = method.predict_logits(images), method.loss(images, LABELS)[0].detach()
    with torch.autocast("cpu", torch.bfloat16):
        rough, rough_loss = method(images).detach(), method.loss(images, LABELS)[0].detach()
    assert rough.dtype == rough_loss.dtype == torch.float32
    # A logit of 100 cosines, at bfloat16's 8 bits: beside the towers' rounding there would be a grid of 0.25 and more.
    assert (rough - exact).abs().max() < 1
    assert float(rough_loss) == pytest.approx(float(loss), abs=0.5, rel=0.1)
    # Float32 values that bfloat16 happens to hold are few.
    assert (rough != rough.bfloat16()).float().mean() > 0.8
