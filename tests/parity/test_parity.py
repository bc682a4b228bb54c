"""Agreement with what the published models compute, recording by recording.

The folder of recordings is named by MAPLE_PARITY; without it, this folder's copy is used. Every `NAME_X.json` with its
`.safetensors` is tested on `clip_X.safetensors`; what it leaves out (class names, images, labels, optimiser) is that of
`cases_X`. Nothing here knows a size or a name, but for settings that are called otherwise here.
"""

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from maple.clip import Backbone
from maple.clip.load import backbone_from_state_dict
from maple.config import TrainSettings
from maple.data import Batch
from maple.methods import METHODS, Method, build_method
from maple.methods.promptsrc import epoch_weights
from maple.train import Trainer

FOLDER = Path(os.environ.get("MAPLE_PARITY") or Path(__file__).parent)
RECORDINGS = sorted(path for path in FOLDER.glob("*_*.json") if path.with_suffix(".safetensors").exists())
DESCRIPTION = ("method", "loss", "train_losses", "epoch_lrs", "parameters", "note", "loss_parts", "gpa_weights")
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
    own = path.with_name(f"{kind}_{path.stem.rpartition('_')[2]}{path.suffix}")
    return own if own.exists() else next(path.parent.glob(f"{kind}_*{path.suffix}"))


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


def cases(*, learning: bool = False) -> list[Any]:
    """All cases, or those in which something is learned."""
    return [
        pytest.param(path, name, id=f"{path.stem}-{name}")
        for path in RECORDINGS
        for name, case in json.loads(path.read_text(encoding="utf-8"))["cases"].items()
        if case.get("parameters") or not learning
    ]


def make(path: Path, name: str) -> tuple[Method, dict[str, Any], dict[str, Any], dict[str, torch.Tensor]]:
    """The case's method, with the recorded initial parameters, its description, the recording, its tensors."""
    described, tensors, backbone = recording(path)
    case = described["cases"][name]
    settings = {RENAMED.get(key, key): value for key, value in case.items() if key not in DESCRIPTION}
    method = build_method({"name": case["method"], **settings}, backbone, described["class_names"])
    for parameter, value in method.prompt_parameters().items():
        with torch.no_grad():
            value.copy_(tensors[f"{name}/init/{parameter}"])
    return method, case, described, tensors


def batches(described: dict[str, Any], tensors: dict[str, torch.Tensor]) -> list[Batch]:
    labels = map(torch.tensor, described["train_labels"])
    return [Batch(images, label) for images, label in zip(tensors["train_images"], labels, strict=True)]


@pytest.mark.parametrize(("path", "name"), cases())
def test_parameters_are_the_recorded_ones(path: Path, name: str) -> None:
    method, case, _, _ = make(path, name)
    shapes = {key: list(value.shape) for key, value in method.prompt_parameters().items()}
    assert shapes == case.get("parameters", {})


@pytest.mark.parametrize(("path", "name"), cases())
def test_evaluation_logits(path: Path, name: str) -> None:
    method, _, _, tensors = make(path, name)
    images, expected = tensors["eval_images"], tensors[f"{name}/eval_logits"]
    with torch.no_grad():
        same(method(images), expected)
    same(method.predict_logits(images), expected)


@pytest.mark.parametrize(("path", "name"), cases(learning=True))
def test_first_batch(path: Path, name: str) -> None:
    method, case, described, tensors = make(path, name)
    batch = batches(described, tensors)[0]
    if f"{name}/logits" in tensors:
        same(method(batch.images).detach(), tensors[f"{name}/logits"])
    loss, logs = method.loss(batch.images, batch.labels)
    same(loss.item(), case["loss"])
    for part, value in case.get("loss_parts", {}).items():
        assert logs[part].item() == pytest.approx(value, rel=1e-4, abs=1e-5 * case["loss"]), part


@pytest.mark.parametrize(("path", "name"), cases(learning=True))
def test_first_gradient(path: Path, name: str) -> None:
    """The one that the first step follows, whatever the method makes of the gradient of its loss."""
    method, _, described, tensors = make(path, name)
    batch = batches(described, tensors)[0]
    Trainer(method, TrainSettings()).run_epoch([(batch, len(batch.labels))])
    for parameter, value in method.prompt_parameters().items():
        assert value.grad is not None
        same(value.grad, tensors[f"{name}/grad/{parameter}"])


@pytest.mark.parametrize(("path", "name"), cases(learning=True))
def test_training(path: Path, name: str) -> None:
    method, case, described, tensors = make(path, name)
    recipe = described["optimizer"]
    settings = TrainSettings(
        optimizer=recipe["name"],
        batch_size=len(described["train_labels"][0]),
        **{key: recipe[key] for key in recipe.keys() & TrainSettings.model_fields.keys()},
    )
    recorded, trainer, size = batches(described, tensors), Trainer(method, settings), recipe["batches_per_epoch"]
    for epoch in range(recipe["epochs"]):
        trainer.run_epoch([(batch, len(batch.labels)) for batch in recorded[epoch * size : (epoch + 1) * size]])
    same([loss for report in trainer.history for loss in report.losses], case["train_losses"])
    same([report.lr for report in trainer.history], case["epoch_lrs"])
    for parameter, value in method.prompt_parameters().items():
        same(value.detach(), tensors[f"{name}/final/{parameter}"])
    same(method.predict_logits(tensors["eval_images"]), tensors[f"{name}/final_eval_logits"])


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
    assert names <= METHODS.keys()
