"""Agreement with what the published models compute, recording by recording.

The folder of recordings is named by MAPLE_PARITY; without it, this folder's copy is used. Every `NAME_X.json` with its
`.safetensors`, in the folder or in one below it, is tested on `clip_X.safetensors`; what it leaves out (class names,
images, labels, optimiser) is that of `cases_X`, of the same folder or of the one above. Nothing here knows a size or a
name, but for settings that are called otherwise here.
"""

import json
import os
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from maple.clip import Backbone
from maple.clip.load import backbone_from_state_dict
from maple.config import TrainSettings
from maple.data import Batch
from maple.methods import METHODS, Features, Method, build_method
from maple.methods.lpplusplus import LPPlusPlus
from maple.methods.promptsrc import epoch_weights
from maple.prompts import l2_normalize
from maple.train import StepReport, Trainer

FOLDER = Path(os.environ.get("MAPLE_PARITY") or Path(__file__).parent)
FILES = [*FOLDER.glob("*_*.json"), *FOLDER.glob("*/*_*.json")]
RECORDINGS = sorted(path for path in FILES if path.with_suffix(".safetensors").exists())
DESCRIPTION = {
    *("method", "loss", "train_losses", "epoch_lrs", "step_lrs", "parameters", "note", "loss_parts", "gpa_weights"),
    *("published_names", "optimizer", "final_tolerance", "fit_labels", "batch_slices", "val_labels", "val_accuracies"),
    *("shots", "lr_weight", "lr_blend", "blend_start", "sentence_draws", "scale_draws", "epoch_lrs_of_groups"),
    *("frozen", "optimizers", "batch_order", "given_to_optimizer_but_frozen", "novel_class_names", "mixed_class_names"),
}
RECIPE = {"eps": "epsilon", "per": "", "betas": ""}
"""Keys of an optimiser that are called otherwise here, or expressed by another setting."""
RENAMED = {"lambda": "strength"}  # not a name in Python


def same(actual: Any, expected: Any, tolerance: float = 1e-4) -> None:
    """Within 1e-4 of each entry, or half of that of the largest one: entries near zero are differences of large sums.

    Measured on the shipped recordings, the largest deviation is 8e-6 of the largest entry.
    """
    actual, expected = torch.as_tensor(actual), torch.as_tensor(expected)
    assert actual.shape == expected.shape
    if not expected.any():
        assert not actual.any(), "an exact zero must stay zero"
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance / 2 * float(expected.abs().max()))


def beside(path: Path, kind: str) -> Path:
    """The file of that kind of the same set, `kind_X`, or the folder's only one."""
    name = f"{kind}_{path.stem.rpartition('_')[2]}{path.suffix}"
    named = [folder / name for folder in (path.parent, path.parent.parent) if (folder / name).exists()]
    others = (file for folder in (path.parent, path.parent.parent) for file in folder.glob(f"{kind}_*{path.suffix}"))
    return named[0] if named else next(others)


@cache
def recording(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor], Backbone]:
    common = beside(path, "cases")
    described = {**json.loads(common.read_text(encoding="utf-8")), **json.loads(path.read_text(encoding="utf-8"))}
    tensors = path.with_suffix(".safetensors")
    shared = load_file(common.with_suffix(".safetensors")) if common != path else {}
    return described, {**shared, **load_file(tensors)}, _clip(beside(tensors, "clip"))


@cache
def _clip(path: Path) -> Backbone:
    state = load_file(path)
    ids, rows = state.pop("token_embedding.ids"), state.pop("token_embedding.rows")
    state["token_embedding.weight"] = torch.full((49408, rows.shape[1]), float("nan"))
    state["token_embedding.weight"][ids.long()] = rows
    return backbone_from_state_dict(state)


def cases(*, learning: bool = False, trained: bool = False, fitted: bool = False) -> list[Any]:
    """All cases of methods that exist, or those in which something is learned, or whose training was recorded.

    Those that are `fitted` have a method that is fitted to the features of all images at once.
    """
    return [
        pytest.param(path, name, id=f"{path.stem}-{name}")
        for path in RECORDINGS
        for name, case in json.loads(path.read_text(encoding="utf-8"))["cases"].items()
        if (case.get("parameters") or not learning)
        and ("train_losses" in case or not trained)
        and ("fit_labels" in case or not fitted)
        and case["method"] in METHODS
    ]


def recipe(described: dict[str, Any], case: dict[str, Any]) -> TrainSettings:
    """The settings of training: those of the case, of its file, or of the set; of all stages together, in one epoch."""
    values = case.get("optimizer", described["optimizer"])
    if "optimizers" in case:
        values = {**case["optimizers"][0], "epochs": 1}
        assert all({**other, "steps": 0} == {**case["optimizers"][0], "steps": 0} for other in case["optimizers"])
    assert values.get("betas", [0.9, 0.999]) == [0.9, 0.999]
    settings = {RECIPE.get(key, key): value for key, value in values.items()}
    if values.get("per") == "step":
        settings |= {"schedule": "cosine_per_step", "warmup_epochs": 0}
    kept = settings.keys() & TrainSettings.model_fields.keys() - {"steps"}
    return TrainSettings(
        optimizer=values["name"],
        batch_size=len(described["train_labels"][0]),
        **{key: settings[key] for key in kept},
    )


def make(path: Path, name: str) -> tuple[Method, dict[str, Any], dict[str, Any], dict[str, torch.Tensor]]:
    """The case's method, with the recorded initial parameters, its description, the recording, its tensors."""
    described, tensors, backbone = recording(path)
    case = described["cases"][name]
    settings = {RENAMED.get(key, key): value for key, value in case.items() if key not in DESCRIPTION}
    if "val_labels" in case:
        settings["select_epoch"] = False  # the recording ends with the last epoch
    method = build_method({"name": case["method"], **settings}, backbone, described["class_names"])
    if "fit_labels" in case:
        if isinstance(method, LPPlusPlus):
            method.start_bias = tensors[f"{name}/init/bias"]  # the random part of its start
        method.fit_features(features(method, case, tensors))
    stages, parameters = method.training_stages(), method.prompt_parameters()
    for parameter in stages[0].parameters:
        with torch.no_grad():
            parameters[parameter].copy_(tensors[f"{name}/init/{parameter}"])
    if len(stages) > 1:
        method.on_epoch_end(0, 1)  # what other stages start from follows from these
    if "sentence_draws" in case:
        drawn = zip(map(torch.tensor, case["sentence_draws"]), case["scale_draws"], strict=True)
        method.draw = lambda _generator, drawn=drawn: next(drawn)  # type: ignore[assignment]
    return method, case, described, tensors


def use_recorded_masks(method: Method, tensors: dict[str, torch.Tensor], name: str) -> None:
    """Let dropout keep what was kept in the recording."""
    for module_name, module in method.named_modules():
        prefix = f"{name}/mask/{module_name}."
        masks = {key.removeprefix(prefix): mask for key, mask in tensors.items() if key.startswith(prefix)}
        if masks and module_name.count(".") == 1:
            kept: Any = module
            kept.drop = partial(_recorded_drop, masks, 1 - kept.dropout)


def _recorded_drop(masks: dict[str, torch.Tensor], share: float, update: str) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda rows: rows * masks[update][:, : rows.shape[1]] / share


def features(method: Method, case: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Features:
    """Those of the images that `fit_labels` label, and of the last images, which `val_labels` label."""
    images = tensors["train_images"].flatten(0, 1)
    labels, val_labels = (torch.tensor(case.get(key, []), dtype=torch.int64) for key in ("fit_labels", "val_labels"))
    with torch.no_grad():
        raw = method.image_features_raw(images)
    return Features(raw[None, : len(labels)], labels, raw[len(raw) - len(val_labels) :], val_labels)


def batches(described: dict[str, Any], case: dict[str, Any], tensors: dict[str, torch.Tensor]) -> list[Batch]:
    """The batch of each step: the recorded ones, or slices of the images that `fit_labels` label."""
    if "fit_labels" in case:
        images, labels = tensors["train_images"].flatten(0, 1), torch.tensor(case["fit_labels"])
        slices = (slice(*ends) for ends in case.get("batch_slices", [(0, len(labels))]))
        return [Batch(images[part], labels[part]) for part in slices]
    pairs = zip(tensors["train_images"], described["train_labels"], strict=True)
    return [Batch(images, torch.tensor(labels)) for images, labels in pairs]


@pytest.mark.parametrize(("path", "name"), cases())
def test_parameters_are_the_recorded_ones(path: Path, name: str) -> None:
    method, case, _, _ = make(path, name)
    shapes = {key: list(value.shape) for key, value in method.prompt_parameters().items()}
    assert shapes == case.get("parameters", {})
    assert not shapes.keys() & set(case.get("given_to_optimizer_but_frozen", ()))


@pytest.mark.parametrize(("path", "name"), cases())
def test_evaluation_logits(path: Path, name: str) -> None:
    method, case, _, tensors = make(path, name)
    images, expected = tensors["eval_images"], tensors[f"{name}/eval_logits"]
    with torch.no_grad():
        same(method(images), expected)
    same(method.predict_logits(images), expected)
    check_other_names(method, case, tensors, f"{name}/eval_logits")


def check_other_names(
    method: Method, case: dict[str, Any], tensors: dict[str, torch.Tensor], kind: str, tolerance: float = 1e-4
) -> None:
    """What a method with a rule for trained names predicts for lists with others.

    Without names of its own, a recording is of the trained names as if they were new.
    """
    similarity = kind.replace("eval_logits", "similarity_eval_logits")
    for key, names in (
        (f"{kind}_novel", case.get("novel_class_names")),
        (f"{kind}_mixed", case.get("mixed_class_names")),
        (similarity, None),
    ):
        if key in tensors:
            others = as_new_names(method) if names is None else method.with_class_names(names)
            same(others.predict_logits(tensors["eval_images"]), tensors[key], tolerance)


def as_new_names(method: Method) -> Method:
    """The method with its class names as if they were new."""
    others = method.with_class_names(method.class_names)
    others.set_trained_names(["a name that is not among them"])  # type: ignore[operator]
    others.set_class_names(method.class_names)
    return others


def train(
    method: Method,
    case: dict[str, Any],
    described: dict[str, Any],
    tensors: dict[str, torch.Tensor],
    on_step: Callable[[Trainer], None] = lambda _: None,
    on_stage: Callable[[Trainer], None] = lambda _: None,
) -> tuple[Trainer, list[StepReport]]:
    """Train by the recorded batches; `on_stage` is called before the first step of each stage after the first."""
    recorded, values = batches(described, case, tensors), case.get("optimizer", described["optimizer"])
    size = sum(stage["steps"] for stage in case.get("optimizers", [])) or values["batches_per_epoch"]
    trainer = Trainer(method, recipe(described, case), steps_per_epoch=size)
    order = case.get("batch_order", range(len(recorded)))
    done: list[StepReport] = []

    def after(step: StepReport) -> None:
        done.append(step)
        on_step(trainer)

    while not trainer.finished:
        stage, part = method.stage, [recorded[index] for index in order[len(done) : len(done) + size]]
        trainer.run_epoch([(batch, len(batch.labels)) for batch in part], after)
        if method.stage != stage:
            on_stage(trainer)
    return trainer, done


@pytest.mark.parametrize(("path", "name"), cases(learning=True))
def test_first_batch(path: Path, name: str) -> None:
    method, case, described, tensors = make(path, name)
    batch = batches(described, case, tensors)[0]
    use_recorded_masks(method.train(), tensors, name)
    if f"{name}/train_logits" in tensors:
        first = torch.tensor(case["sentence_draws"][0])
        text, image = method.features_at(case["adapter_train_scale"], first, batch.images)  # type: ignore[operator]
        same(method.logits(image, text).detach(), tensors[f"{name}/train_logits"])
    if f"{name}/head_logits" in tensors:  # then the others are those of the similarity alone
        images = method.image_features_raw(batch.images)
        text = method.class_features_raw(l2_normalize(images))
        head = method.head_logits(images, text, batch.labels)  # type: ignore[operator]
        same(head.detach(), tensors[f"{name}/head_logits"])
        same(as_new_names(method)(batch.images).detach(), tensors[f"{name}/logits"])
    elif f"{name}/logits" in tensors:
        same(method(batch.images).detach(), tensors[f"{name}/logits"])
    loss, logs = method.loss(batch.images, batch.labels)
    same(loss.item(), case["loss"])
    for part, value in case.get("loss_parts", {}).items():
        assert logs[part].item() == pytest.approx(value, rel=1e-4, abs=1e-5 * abs(case["loss"])), part


@pytest.mark.parametrize(("path", "name"), cases(learning=True))
def test_first_gradient(path: Path, name: str) -> None:
    """The one that the first step of each stage follows, whatever the method makes of the gradient of its loss."""
    method, case, described, tensors = make(path, name)
    use_recorded_masks(method, tensors, name)
    gradients: dict[str, torch.Tensor] = {}

    def keep(trainer: Trainer) -> None:
        for parameter, value in trainer.trained.items():
            assert value.grad is not None
            gradients.setdefault(parameter, value.grad.clone())

    stages = method.training_stages()
    if len(stages) > 1:
        train(method, case, described, tensors, keep)
    else:
        batch, trainer = batches(described, case, tensors)[0], Trainer(method, TrainSettings())
        trainer.run_epoch([(batch, len(batch.labels))])
        keep(trainer)
    assert gradients.keys() == case["parameters"].keys()
    for parameter, gradient in gradients.items():
        tolerance = 1e-4 if parameter in stages[0].parameters else case.get("final_tolerance", 1e-4)
        same(gradient, tensors[f"{name}/grad/{parameter}"], tolerance)


@pytest.mark.parametrize(("path", "name"), cases(learning=True, trained=True))
def test_training(path: Path, name: str) -> None:
    method, case, described, tensors = make(path, name)
    if isinstance(method, LPPlusPlus):
        check_fit(method, case, tensors)
    else:
        check_steps(method, case, described, tensors, name)
    method.eval()
    tolerance = case.get("final_tolerance", 1e-4)
    for parameter, value in method.prompt_parameters().items():
        same(value.detach(), tensors[f"{name}/final/{parameter}"], tolerance)
    same(method.predict_logits(tensors["eval_images"]), tensors[f"{name}/final_eval_logits"], tolerance)
    check_other_names(method, case, tensors, f"{name}/final_eval_logits", tolerance)


def check_fit(method: LPPlusPlus, case: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Train a method that has an optimizer of its own, as `fit_features` does, and compare its course."""
    method.fit_features(features(method, case, tensors))
    same(method.fit_losses, case["train_losses"])
    same(100 * torch.tensor(method.val_accuracies), case["val_accuracies"])
    same(method.rates, (case["lr_weight"], case["lr_blend"]))


def check_steps(
    method: Method, case: dict[str, Any], described: dict[str, Any], tensors: dict[str, torch.Tensor], name: str
) -> None:
    """Train by the recorded batches, and compare losses and rates, and what each stage starts from."""

    def compare_start(trainer: Trainer) -> None:
        for parameter, value in trainer.trained.items():
            same(value.detach(), tensors[f"{name}/init/{parameter}"], case.get("final_tolerance", 1e-4))

    rates: list[list[float]] = []  # of each step, of the parameters with each factor

    def note_rates(trainer: Trainer) -> None:
        assert trainer._optimizer is not None
        rates.append([group["lr"] for group in trainer._optimizer.param_groups])

    trainer, steps = train(method, case, described, tensors, on_step=note_rates, on_stage=compare_start)
    same([step.loss for step in steps], case["train_losses"])
    if "step_lrs" in case:
        same([step.lr for step in steps], case["step_lrs"])
    else:
        same([report.lr for report in trainer.history], case["epoch_lrs"])
        steps_per_epoch = len(steps) // len(trainer.history)
        recorded = case.get("epoch_lrs_of_groups", [[lr] for lr in case["epoch_lrs"]])
        # Groups of one factor are one group here.
        same([epoch * (len(recorded[0]) // len(epoch)) for epoch in rates[::steps_per_epoch]], recorded)


# What a method on frozen features computes before it is trained, under the names of the recordings.
COMPUTED: dict[str, Callable[[Any, Features], torch.Tensor]] = {
    "base_text_features": lambda method, _: method.classes.mean,
    "text_weights": lambda method, _: method.classes.features.T,
    "multipliers": lambda method, _: method.constraint_weights,
    "features": lambda _, fitted: fitted.train[0],
}


@pytest.mark.parametrize(("path", "name"), cases(fitted=True))
def test_what_is_computed_of_features(path: Path, name: str) -> None:
    method, case, _, tensors = make(path, name)
    fitted = features(method, case, tensors)
    for kind in COMPUTED.keys() & {key.removeprefix(f"{name}/") for key in tensors}:
        expected = tensors[f"{name}/{kind}"]
        actual = COMPUTED[kind](method, fitted)
        unit = kind == "features" and torch.allclose(expected.norm(dim=-1), torch.ones(len(expected)))
        same(l2_normalize(actual) if unit else actual, expected)
    if isinstance(method, LPPlusPlus):
        method.start(fitted)
        for parameter, value in method.prompt_parameters().items():
            same(value.detach(), tensors[f"{name}/init/{parameter}"])


def test_weights_of_epochs() -> None:
    for path in RECORDINGS:
        for case in json.loads(path.read_text(encoding="utf-8"))["cases"].values():
            if "gpa_weights" in case:
                weights = epoch_weights(len(case["gpa_weights"]), case["gpa_mean"], case["gpa_std"])
                same(weights, case["gpa_weights"], 1e-9)


@pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: path.stem)
def test_tokens(path: Path) -> None:
    described, _, backbone = recording(path)
    for sentence, ids in described.get("tokenized", {}).items():
        assert [i for i in backbone.tokenize([sentence])[0].tolist() if i] == ids


def test_there_are_recordings() -> None:
    assert RECORDINGS, f"no cases_*.json with its .safetensors in {FOLDER}"
    names = {case["method"] for path in RECORDINGS for case in json.loads(path.read_text())["cases"].values()}
    assert names & METHODS.keys()
    for name in sorted(names - METHODS.keys()):
        pytest.skip(f"{name} is not a method here")
