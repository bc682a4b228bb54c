"""The packaged CLIP sees, and prompts teach it more: what random weights cannot show."""

import json
import re
from importlib import resources
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from maple.cli import app
from maple.clip import Backbone, load_clip
from maple.config import RunSettings, read_preset, resolve
from maple.data import Dataset, EvalTransform, eval_batches, load_dataset
from maple.data.emoji import archive
from maple.data.emoji.archive import scene_seed
from maple.data.scenes import render_scene
from maple.errors import BackboneError
from maple.evaluation import evaluate
from maple.methods import build_method
from maple.metrics import Scores
from maple.runs import evaluate_run, train_run

FOLDER = Path(str(resources.files("maple"))) / "assets" / "small_clip"


@pytest.fixture(scope="module")
def small() -> Backbone:
    return load_clip("maple-small")


def zero_shot(backbone: Backbone, dataset: Dataset, scenes: int = 2) -> Scores:
    """All concepts of a group, the first test scenes of each."""
    method = build_method({"name": "zero_shot"}, backbone, dataset.class_names)
    per_concept = len(dataset.test) // dataset.num_classes
    items = [item for number, item in enumerate(dataset.test) if number % per_concept < scenes]
    seen = backbone.preprocessing
    transform = EvalTransform(seen.size, seen.mean, seen.std, seen.interpolation)
    return evaluate(method, eval_batches(items, dataset.store(), transform, batch_size=100))


def test_what_it_is(small: Backbone) -> None:
    assert (small.text.depth, small.image.depth, small.text.width, small.image.width) == (4, 6, 128, 192)
    assert (small.embed_dim, small.preprocessing.size, small.text.context_length) == (128, 64, 77)
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 25e6
    assert {"MODEL_CARD.md", "training_log.jsonl", "open_clip_config.json"} <= {path.name for path in FOLDER.iterdir()}


def test_it_has_only_its_own_weights() -> None:
    with pytest.raises(BackboneError, match="maple-small is shipped with its weights; pretrained='openai'"):
        load_clip("maple-small", "openai")


def test_seen_styles_are_seen_well_and_unseen_ones_above_chance(small: Backbone) -> None:
    top1 = {style: zero_shot(small, load_dataset(f"emoji-food/{style}", None)).top1 for style in archive().styles}
    assert min(top1[style] for style in ("openmoji", "noto", "fluent")) > 0.6
    chance = 1 / 128
    assert 10 * chance < top1["twemoji"] < min(top1[style] for style in ("openmoji", "noto", "fluent"))
    assert 5 * chance < top1["lineart"] < top1["openmoji"]


def test_the_model_card_tells_what_is_measured(small: Backbone) -> None:
    (row,) = re.findall(r"^\| food \| 128 \| 0\.8 \| ([\d.]+) ", (FOLDER / "MODEL_CARD.md").read_text(), re.M)[:1]
    concepts = archive().concepts("food")
    method = build_method({"name": "zero_shot"}, small, [concept.name for concept in concepts])
    seen = small.preprocessing
    transform = EvalTransform(seen.size, seen.mean, seen.std, seen.interpolation)
    seeds = [scene_seed("openmoji", concept.code, 1_000_000) for concept in concepts]
    pictures = [
        transform(render_scene(archive().glyph("openmoji", concept.code), seed, difficulty=0.25))
        for concept, seed in zip(concepts, seeds, strict=True)
    ]
    right = method.predict_logits(torch.stack(pictures)).argmax(1) == torch.arange(128)
    assert 100 * right.float().mean().item() == pytest.approx(float(row), abs=1.0)


def settings_on(dataset: str, method: str, *overrides: str) -> RunSettings:
    layers = [read_preset(f"{method}_base-to-novel"), {"data": {"dataset": dataset, "classes": "base", "shots": 8}}]
    return resolve(layers, overrides)


def test_prompts_learn_a_new_style(tmp_path: Path) -> None:
    """A few pictures of each of 43 classes, and their accuracy on held-out scenes rises well above zero-shot."""
    found = {}
    for method, overrides in (("zero_shot", ()), ("maple", ("train.epochs=6",))):
        folder = tmp_path / method
        history = train_run(settings_on("emoji-activities/twemoji", method, *overrides), folder, device="cpu").history
        found[method] = evaluate_run(folder, classes="base", device="cpu")[0]
    assert history[-1].loss < 0.7 * history[0].loss
    assert found["maple"].top1 > found["zero_shot"].top1 + 0.05
    assert found["maple"].macro_f1 > found["zero_shot"].macro_f1
    assert found["maple"].calibration_error < 0.4


def test_pictures_are_named_right(tmp_path: Path) -> None:
    """By the commands that a newcomer types: draw pictures, train nothing, ask."""
    train_run(settings_on("emoji-food/noto", "zero_shot"), tmp_path / "run", device="cpu")
    runner = CliRunner()
    drawn = runner.invoke(app, ["data", "draw", "emoji-food/noto", "--count", "8", "--output", str(tmp_path / "drawn")])
    assert drawn.exit_code == 0, drawn.output
    asked = ["predict", str(tmp_path / "run"), str(tmp_path / "drawn"), "--json", "--device", "cpu"]
    done = runner.invoke(app, [*asked, "--classes", ",".join(concept.name for concept in archive().concepts("food"))])
    assert done.exit_code == 0, done.output
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    right = [Path(a["source"]).stem.rpartition("_")[0] == a["best"][0]["class"].replace(" ", "_") for a in answers]
    assert len(right) == 8
    assert sum(right) >= 6
