"""What every method promises, as checks for those of other packages; scikit-learn's `check_estimator` has the same aim.

Training, sweeps, commands, the server and exports rely on these promises. A check raises AssertionError, with the
promise that is broken.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.testing import assert_close

from maple.checkpoint import load_prompts, put_parameters, read_prompts, save_prompts
from maple.clip import Backbone, load_clip
from maple.config import TrainSettings
from maple.data import Batch
from maple.errors import ClassNamesError, MapleError, UnlearnedClassesError, shortened_list
from maple.methods import METHODS, Method, build_method
from maple.plugins import trust_code
from maple.train import Trainer
from maple.train.optimization import make_optimizer

NAMES = ("cat", "dog", "fire_truck")
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])
_assert_near = partial(assert_close, rtol=1e-4, atol=1e-4)


@dataclass(frozen=True)
class MethodCase:
    """A method to check: how it is made for class names and a seed, six images, and an empty folder.

    Example:
        >>> case = MethodCase(lambda names=NAMES, seed=1: Shift(...), torch.randn(6, 3, 64, 64), tmp_path)
        >>> check_images_do_not_see_each_other(case)
    """

    make: Callable[..., Method]
    images: Tensor
    folder: Path


def check_method(
    method: type[Method] | str,
    settings: Mapping[str, Any] | None = None,
    *,
    backbone: Backbone | None = None,
    on_check: Callable[[str], None] = lambda _: None,
) -> None:
    """Check all promises of a method.

    Args:
        method: a class, a name of `METHODS`, or a file of one, PATH/FILE.py:CLASS.
        settings: of the method; by default its own.
        backbone: by default a CLIP with random weights that has four blocks in each tower and images of 64 x 64.
        on_check: called with the name of each check before it is made.

    Raises:
        AssertionError: a promise is broken.
        MapleError: the method cannot be made with these settings on this backbone.

    Example:
        >>> check_method("shift.py:Shift", {"strength": 0.5})
    """
    clip = backbone or load_clip("maple-tiny", "random:0")
    size = clip.preprocessing.size
    images = torch.randn(6, 3, size, size, generator=torch.Generator().manual_seed(0)).to(clip.device)
    name = trust_code(method) if isinstance(method, str) else METHODS.name_of(method) or f"checked-{method.__name__}"
    is_new = not isinstance(method, str) and name not in METHODS
    if is_new and not isinstance(method, str):
        METHODS[name] = method
    description = {"name": name, **(settings or {})}
    METHODS.find(name)

    def make(names: Sequence[str] = NAMES, seed: int = 1) -> Method:
        return build_method(description, clip, names, generator=torch.Generator().manual_seed(seed))

    try:
        for check in METHOD_CHECKS:
            on_check(check.__name__)
            with TemporaryDirectory() as folder:
                check(MethodCase(make, images, Path(folder)))
    finally:
        if is_new:
            del METHODS[name]


def values_of(method: Method) -> dict[str, Tensor]:
    """Copies of what a method has learned, by name."""
    return {name: parameter.detach().clone() for name, parameter in method.prompt_parameters().items()}


def equal_values(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    """Whether both have the same names and bits."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@torch.no_grad()
def logits_of(method: Method, images: Tensor) -> Tensor:
    """The logits [B, C] of `forward`, without a gradient."""
    logits: Tensor = method(images)
    return logits


def stage_losses(method: Method, images: Tensor, labels: Tensor = LABELS) -> Iterator[Tensor]:
    """The loss of each stage of a training, for images with these labels."""
    for stage in range(len(method.training_stages())):
        method.stage = stage
        loss, logs = method.loss(images, labels.to(images.device))
        _promise(logs.keys() == set(method.log_names), f"loss logs {sorted(logs)}, but log_names is {method.log_names}")
        yield loss


def train_step(method: Method, images: Tensor) -> None:
    """A step of each stage of a training."""
    method.zero_grad()
    for loss in stage_losses(method, images):
        loss.backward()
    make_optimizer(method.prompt_parameters().values(), TrainSettings(lr=0.1)).step()


def trained_and_loaded(method: Method, images: Tensor, folder: Path, *, learns: bool = True) -> Method:
    """Two steps change what is learned and nothing of the backbone; saved and loaded, the method predicts the same."""
    backbone = method.backbone
    frozen = {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}
    before, untrained = values_of(method), logits_of(method, images)
    _promise(bool(untrained.isfinite().all()), "the logits are not finite")
    if learns:
        for _ in range(2):  # where a layer starts at zero, the one before it gets its first gradient in the second
            train_step(method, images)
        same = [name for name, value in values_of(method).items() if torch.equal(before[name], value)]
        _promise(not same, f"two training steps leave these parameters as they were: {same}")
        _promise(not torch.equal(logits_of(method, images), untrained), "training steps do not change the logits")
    _promise(
        all(weight.grad is None and not weight.requires_grad for weight in backbone.model.parameters())
        and equal_values(frozen, backbone.model.state_dict()),
        "the backbone is frozen: its weights get no gradient, and never change",
    )
    save_prompts(folder / "prompts.safetensors", method)
    loaded = load_prompts(folder / "prompts.safetensors", backbone)
    _promise(torch.equal(logits_of(loaded, images), logits_of(method, images)), "loaded again, it has the same logits")
    return loaded


def check_shapes_and_unit_norms(case: MethodCase) -> None:
    """Logits [B, C] in float32, and unit features; other entries may follow the first D of each."""
    method = case.make()
    width = method.backbone.embed_dim
    with torch.no_grad():
        logits, image_features = method(case.images), method.encode_images(case.images)
        text_features = method.encode_classes_for(image_features)
        if not method.classes_depend_on_image:
            assert_close(text_features, method.encode_classes())
    _promise(logits.shape == (6, 3) and logits.dtype == torch.float32, "logits are float32 [B, C]")
    assert_close(image_features[:, :width].norm(dim=-1).cpu(), torch.ones(6))
    expected = (6, 3) if method.classes_depend_on_image else (3,)
    _promise(text_features.shape == (*expected, image_features.shape[1]), "class embeddings are as wide as images'")
    if image_features.shape[1] == width:
        assert_close(text_features.norm(dim=-1).cpu(), torch.ones(expected))


def check_only_learned_parameters_receive_gradients(case: MethodCase) -> None:
    """`parameters()` are exactly what is learned, in float32; each gets a gradient in a stage that trains it."""
    method = case.make()
    parameters = method.prompt_parameters()
    _promise(
        {id(value) for value in parameters.values()} == {id(value) for value in method.parameters()},
        "parameters() are those of prompt_parameters()",
    )
    frozen = {id(weight) for weight in method.backbone.model.parameters()}
    _promise(not frozen & {id(value) for value in parameters.values()}, "the backbone is not a submodule")
    with torch.no_grad():  # a product whose one factor starts at zero gives the other no gradient
        for parameter in parameters.values():
            noise = 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
            parameter.add_(noise.to(parameter.device))
    stages = method.training_stages()
    for loss in stage_losses(method, case.images):
        if parameters:
            loss.backward()
        else:
            _promise(not loss.requires_grad, "nothing is learned, so the loss has no gradient")
        learned = {name for name, parameter in parameters.items() if parameter.grad is not None}
        expected = {name for stage in stages[: method.stage + 1] for name in stage.parameters}
        wrong = shortened_list(sorted(learned ^ expected))
        _promise(not wrong, f"stage {method.stage} gives gradients to what it trains alone; not so: {wrong}")
    for name, parameter in parameters.items():
        _promise(parameter.grad is not None and bool(parameter.grad.abs().sum() > 0), f"{name} gets no gradient")
        _promise(parameter.dtype == torch.float32, f"{name} is {parameter.dtype}; what is learned is float32")
    weights = method.backbone.model.parameters()
    _promise(all(not weight.requires_grad and weight.grad is None for weight in weights), "the backbone is frozen")


def check_training_saving_and_loading(case: MethodCase) -> None:
    """Two steps change all that is learned and nothing else; a prompts file has all of it, and no more."""
    method = case.make()
    saved = method.saved_tensors()
    loaded = trained_and_loaded(method, case.images, case.folder, learns=bool(method.prompt_parameters()))
    _promise(type(loaded) is type(method) and loaded.settings == method.settings, "it is loaded with its settings")
    _promise(loaded.class_names == NAMES, "it is loaded with its class names")
    _promise(equal_values(values_of(loaded), values_of(method)), "it is loaded with the same parameters")
    other = shortened_list(sorted(method.state_dict().keys() ^ method.saved_tensors().keys()))
    _promise(len(method.state_dict()) == len(saved), f"state_dict() has what is saved and no more; not so: {other}")
    _promise(method.prompt_parameters().keys() <= saved.keys(), "what is learned is saved")
    stored = read_prompts(case.folder / "prompts.safetensors").tensors
    _promise(stored.keys() == saved.keys(), "the prompts file has the tensors of saved_tensors()")


def check_loss_is_a_mean_over_images(case: MethodCase) -> None:
    """A batch may be divided: the losses of its parts, weighted by their numbers of images, add up to that of all."""
    method = case.make()
    if method.settings.draws_random_numbers or not method.prompt_parameters():
        return
    train_step(method, case.images)  # a term may be zero before
    with torch.no_grad():
        whole, first, second = (
            torch.stack(list(stage_losses(method, case.images[part], LABELS[part])))
            for part in (slice(6), slice(4), slice(4, 6))
        )
    same = torch.allclose(whole, (4 * first + 2 * second) / 6, rtol=1e-3, atol=1e-4)
    _promise(same, f"the loss is a mean over images; that of six is {whole.tolist()}, of parts {first, second}")


def check_new_class_names(case: MethodCase) -> None:
    """Other class names leave what is learned alone, and the logits of a name do not depend on the others."""
    method = case.make()
    before, old = values_of(method), logits_of(method, case.images)
    names = ["owl", "submarine", "cat", "tea", "old castle"]
    if not method.supports_new_classes:
        _refuses(UnlearnedClassesError, method.set_class_names, names)
        _refuses(UnlearnedClassesError, method.with_class_names, ["cat", "submarine"])
        names = ["fire_truck", "cat"]
    method.set_class_names(names)
    _promise(equal_values(before, values_of(method)), "class names do not change what is learned")
    _promise(method.class_names == tuple(names), "class_names are those that were set")
    new = logits_of(method, case.images)
    _promise(new.shape == (6, len(names)), "there is a logit for each name")
    # Sums over another number of rows are rounded otherwise, and logits are up to a hundred times a cosine.
    assert_close(new[:, names.index("cat")], old[:, 0], rtol=1e-5, atol=3e-5)
    method.set_class_names(NAMES)
    _promise(torch.equal(logits_of(method, case.images), old), "with its old names it has the old logits")


def check_refused_class_names_change_nothing(case: MethodCase) -> None:
    """No name, one that is not a string with a word, and one that is too long are refused by ClassNamesError."""
    method = case.make()
    before = logits_of(method, case.images)
    refused: list[Any] = [[], "cat", ["cat", ""], ["cat", 3], ["cat", "_ _"], ["cat", "very " * 80]]
    for names in refused:
        _refuses(ClassNamesError, method.set_class_names, names)
        _promise(method.class_names == NAMES, f"the refused names {names!r:.60} have changed class_names")
        _promise(torch.equal(logits_of(method, case.images), before), f"the refused names {names!r:.60} change logits")
    _refuses(ClassNamesError, case.make, ["cat", "very " * 80 + "long"])


def check_names(case: MethodCase) -> None:
    """One name, names of any script, and underscores, which are spaces."""
    _promise(logits_of(case.make(["cat"]), case.images).shape == (6, 1), "one class is enough")
    names = ["naïve café", "日本語", "Ærøskøbing", "🦉", "St. John's (wort)", "it's"]
    logits = logits_of(case.make(names), case.images)
    _promise(logits.shape == (6, 6) and bool(logits.isfinite().all()), "names may be in any script")
    underscore, space = (logits_of(case.make(["cat", name]), case.images) for name in ("fire_truck", "fire truck"))
    _promise(torch.equal(underscore, space), "underscores in names are spaces")


def check_randomness(case: MethodCase) -> None:
    """The given generator is the only source of randomness."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        state = torch.random.get_rng_state()
        first = case.make()
        logits = logits_of(first, case.images)
        _promise(torch.equal(torch.random.get_rng_state(), state), "torch's global generator is left alone")
        torch.manual_seed(12)
        again = case.make()
    _promise(equal_values(values_of(first), values_of(again)), "equal seeds give equal parameters")
    _promise(torch.equal(logits, logits_of(again, case.images)), "equal seeds give equal logits")


def check_loss_falls(case: MethodCase, most: float = 0.99) -> None:
    """On three separable classes, to less than `most` of what it was: little can be learned on random weights."""
    if not case.make().prompt_parameters():
        return
    generator = torch.Generator().manual_seed(0)
    shape = case.images.shape[1:]
    prototypes = 2 * torch.randn(3, *shape, generator=generator)
    images = prototypes[LABELS] + 0.1 * torch.randn(6, *shape, generator=generator)
    batch = Batch(images.to(case.images.device), LABELS.to(case.images.device))
    trainer = Trainer(
        case.make(), TrainSettings(optimizer="adamw", lr=0.01, warmup_epochs=0, epochs=16, schedule="constant")
    )
    losses = [trainer.run_epoch([(batch, 6)]).loss for _ in range(16)]
    _promise(min(losses[-3:]) < most * losses[0], f"the loss of a separable batch falls; it was {losses}")


def check_resuming(case: MethodCase) -> None:
    """A training that is interrupted and resumed ends in the same bits."""
    if not case.make().prompt_parameters():
        return
    settings = TrainSettings(lr=0.01, warmup_epochs=0, epochs=3)
    straight, first, second = (Trainer(case.make(), settings) for _ in range(3))
    batches = [(Batch(case.images, LABELS.to(case.images.device)), 6)]
    for _ in range(3):
        straight.run_epoch(batches)
    first.run_epoch(batches)
    second.restore(*first.state())
    for _ in range(2):
        second.run_epoch(batches)
    same = equal_values(second.method.saved_tensors(), straight.method.saved_tensors())
    _promise(same, "a resumed training ends in the bits of one without an interruption")


def check_predictions(case: MethodCase) -> None:
    """`predict_logits` computes what `forward` does, and needs no gradient."""
    method = case.make()
    predicted = method.predict_logits(case.images)
    assert_close(predicted, logits_of(method, case.images), rtol=1e-5, atol=1e-5)
    _promise(not predicted.requires_grad, "predictions need no gradient")


def check_features_in_place_of_images(case: MethodCase) -> None:
    """Where the image tower is left alone, features of the frozen one may be given in place of images."""
    method = case.make()
    if not method.accepts_features:
        _promise(bool(method.vision_edits()), "accepts_features is false where vision_edits has some")
        return
    with torch.no_grad():
        features = method.backbone.image.plain(case.images)
    assert_close(logits_of(method, features), logits_of(method, case.images), rtol=1e-5, atol=1e-5)
    labels = LABELS.to(case.images.device)
    _assert_near(method.loss(features, labels), method.loss(case.images, labels))


def check_images_do_not_see_each_other(case: MethodCase) -> None:
    """The logits of an image do not depend on the others of its batch."""
    method = case.make()
    _assert_near(logits_of(method, case.images)[2:3], logits_of(method, case.images[2:3]))


def check_class_embeddings_are_cached(case: MethodCase) -> None:
    """Until the class names or a parameter change, however it is changed."""
    method = case.make()
    if method.classes_depend_on_image:
        return

    def renewed() -> bool:
        return bool(torch.equal(method.class_embeddings(), type(method).encode_classes(method)))

    for _ in range(2):
        embeddings = method.class_embeddings()
        cached = not embeddings.requires_grad and embeddings is method.class_embeddings()
        _promise(cached, "class embeddings are cached")
    if method.prompt_parameters():
        train_step(method, case.images)
        _promise(renewed(), "class embeddings are computed again after a step")
        parameter = next(iter(method.prompt_parameters().values()))
        parameter.data.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
        _promise(renewed(), "class embeddings are computed again after a parameter was changed in place")
    saved = {name: value.detach().clone() for name, value in case.make(seed=9).saved_tensors().items()}
    put_parameters(method, saved, source="a check")
    _promise(renewed(), "class embeddings are computed again after tensors were loaded")
    method.set_class_names(["dog", "cat"])
    _promise(renewed(), "class embeddings are computed again for other names")


def check_inference_before_training(case: MethodCase) -> None:
    """What was made in inference mode serves training, with little memory for the text tower too."""
    method, alone = case.make(), case.make()
    labels = LABELS.to(case.images.device)
    method.limit_text_memory(1)
    for names in (["dog", "cat", "fire_truck"], NAMES):
        with torch.inference_mode():
            method.set_class_names(names)
            method.predict_logits(case.images)
        loss, _ = method.loss(case.images, labels)
    if method.prompt_parameters():
        loss.backward()
        alone.loss(case.images, labels)[0].backward()
        for name, parameter in method.prompt_parameters().items():
            # Sentence by sentence, sums are rounded otherwise than together.
            assert_close(parameter.grad, alone.prompt_parameters()[name].grad, rtol=1e-5, atol=1e-5)
    method.predict_logits(case.images)


def check_copies_for_other_names(case: MethodCase) -> None:
    """`with_class_names` shares what is learned, and leaves the method as it is."""
    method = case.make()
    before = logits_of(method, case.images)
    names = ["dog", "cat", "fire_truck"] if method.supports_new_classes else ["dog", "cat"]
    other = method.with_class_names(names)
    with torch.no_grad():
        logits, features = other.predict_logits(case.images), method.encode_images(case.images)
        _promise(torch.equal(other.logits_of(features), logits), "logits_of features are those of images")
    _promise((other.class_names, method.class_names) == (tuple(names), NAMES), "each has its own names")
    _promise(torch.equal(logits_of(method, case.images), before), "the method is left as it is")
    method.set_class_names(names)
    _assert_near(logits, logits_of(method, case.images))
    learned, shared = method.prompt_parameters(), other.prompt_parameters()
    same = learned.keys() == shared.keys() and all(learned[name] is shared[name] for name in learned)
    _promise(same, "parameters are shared")


def check_full_precision_outside_the_towers(case: MethodCase) -> None:
    """Also under a caller's own autocast."""
    method, labels = case.make(), LABELS.to(case.images.device)
    exact, loss = method.predict_logits(case.images), method.loss(case.images, labels)[0].detach()
    with torch.autocast(case.images.device.type, torch.bfloat16):
        rough, rough_loss = method(case.images).detach(), method.loss(case.images, labels)[0].detach()
    _promise(rough.dtype == rough_loss.dtype == torch.float32, "logits and loss are float32 under autocast, too")
    # A logit of 100 cosines, at bfloat16's 8 bits: a grid of 0.25 and more would add to the towers' rounding.
    _promise(bool((rough - exact).abs().max() < 1), "logits are computed in full precision under autocast")
    assert_close(rough_loss, loss, atol=0.5, rtol=0.1)
    # Float32 values that bfloat16 happens to hold are few.
    exact_share = (rough != rough.bfloat16()).float().mean()
    _promise(bool(exact_share > 0.8), "logits are computed in full precision under autocast")


def check_description(case: MethodCase) -> None:
    """It describes itself, and says before training, by its settings alone, whether it supports new classes."""
    method = case.make()
    _promise(bool(method.title and method.paper and method.summary), "title, paper and summary are texts")
    supports = method.settings.supports_new_classes
    _promise(supports == method.supports_new_classes, "the settings alone say whether new classes are supported")


METHOD_CHECKS: tuple[Callable[[MethodCase], None], ...] = tuple(
    value for name, value in list(globals().items()) if name.startswith("check_") and name != check_method.__name__
)
"""All checks, for `pytest.mark.parametrize("check", METHOD_CHECKS)`."""


def _promise(holds: bool, promise: str) -> None:
    if not holds:
        raise AssertionError(f"broken promise: {promise}")


def _refuses(kind: type[MapleError], function: Callable[[Any], object], names: Any) -> None:
    try:
        function(names)
    except kind:
        return
    except Exception as error:
        raise AssertionError(f"{names!r:.60} must be refused by {kind.__name__}, not {type(error).__name__}") from error
    raise AssertionError(f"{names!r:.60} must be refused by {kind.__name__}")
