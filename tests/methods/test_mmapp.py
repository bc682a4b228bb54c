"""MMA++: its sentences, and what it draws at random."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from maple.checkpoint import load_prompts, save_prompts
from maple.clip import Backbone
from maple.config import TrainSettings
from maple.data import Batch
from maple.errors import ClassNamesError, ConfigError
from maple.methods import build_method, method_settings
from maple.methods.mmapp import MMAPlusPlus, eighty_templates
from maple.prompts import l2_normalize
from maple.train import Trainer

SENTENCES = {
    "cat": ["a cat that sleeps.", "a cat."],
    "Fire_Truck": ["a red fire truck.", "a fire truck on its way.", "sirens."],
    "owl": ["an owl at night."],
}
SIZES: dict[str, Any] = {"name": "mmapp", "adapter_start": 2, "adapter_end": 3, "adapter_width": 8}
SCALES = {"adapter_train_scale": 0.1, "adapter_test_scale": 0.05}
LABELS = torch.tensor([0, 1, 0, 1])


def make(backbone: Backbone, **settings: Any) -> MMAPlusPlus:
    description = {**SIZES, **SCALES, "sentences": SENTENCES, **settings}
    method = build_method(description, backbone, ["cat", "fire truck"])
    assert isinstance(method, MMAPlusPlus)
    return method


@pytest.fixture
def images() -> Tensor:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_there_are_eighty_templates() -> None:
    templates = method_settings({"name": "mmapp"})[1].model_dump()["templates"]
    assert templates == eighty_templates()
    assert len(set(templates)) == 80
    assert all(template.count("{}") == 1 for template in templates)


def test_a_class_is_the_mean_of_its_sentences(backbone: Backbone) -> None:
    method = make(backbone)
    assert method.classes.counts == (2, 3)
    each = [method.classes.encode_one(method.text_edits(), torch.tensor([min(n, 1), n]))[1] for n in range(3)]
    expected = l2_normalize(torch.stack(each).mean(dim=0))
    torch.testing.assert_close(method.encode_classes()[1], expected)


def test_sentences_of_a_file_are_saved_with_the_prompts(backbone: Backbone, tmp_path: Path) -> None:
    path = tmp_path / "sentences.json"
    path.write_text(json.dumps(SENTENCES))
    method = make(backbone, sentences=str(path))
    save_prompts(tmp_path / "prompts.safetensors", method)
    path.unlink()
    loaded = load_prompts(tmp_path / "prompts.safetensors", backbone)
    assert torch.equal(loaded.class_embeddings(), method.class_embeddings())
    assert loaded.with_class_names(["owl", "FIRE truck"]).class_embeddings().shape == (2, backbone.embed_dim)


def test_a_sentence_loses_the_end_that_the_clip_does_not_read(backbone: Backbone) -> None:
    long, cut = f"a cat {'very ' * 100}small.", f"a cat{' very' * 200}"
    method = make(backbone, sentences={**SENTENCES, "cat": [long]})
    same = make(backbone, sentences={**SENTENCES, "cat": [cut]})
    assert torch.equal(method.encode_classes(), same.encode_classes())
    ids = method.classes.sentences.ids
    assert ids.shape[1] == 77
    assert ids.max() == ids[0, -1], "the end token"
    with pytest.raises(ClassNamesError, match="this CLIP reads at most 77"):
        make(backbone, sentences="", templates=["a photo of a {}."]).set_class_names(["very " * 100])


def test_a_class_without_sentences_is_an_error_that_says_what_to_do(backbone: Backbone) -> None:
    with pytest.raises(ClassNamesError, match=r"sentences has none for 'dog', 'cow', only for cat.*train with"):
        make(backbone).set_class_names(["cat", "dog", "cow"])


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('{"cat": []}', "at least one sentence for 'cat'"),
        ('{"cat": ["a cat.", " "]}', "none without a word"),
        ('{"cat": "a cat."}', "cat"),
        ('["a cat."]', "must hold|object|array"),
        ("a cat", "unreadable or damaged"),
        (None, "does not exist"),
    ],
)
def test_unusable_files(content: str | None, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "sentences.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=problem):
        method_settings({"name": "mmapp", "sentences": str(path)})


def trainer_of(method: MMAPlusPlus, **settings: Any) -> Trainer:
    return Trainer(method, TrainSettings(lr=0.05, warmup_epochs=0, epochs=2, **settings), seed=7)


def run_epoch(trainer: Trainer, images: Tensor) -> None:
    trainer.run_epoch([(Batch(images, LABELS), 4)] * 2)


def test_parts_of_a_step_share_what_is_drawn(backbone: Backbone, images: Tensor) -> None:
    whole, parts = (trainer_of(make(backbone, dropout=0.0), micro_batch=size) for size in (None, 1))
    for trainer in (whole, parts):
        run_epoch(trainer, images)
    for name, value in whole.parameters.items():
        torch.testing.assert_close(parts.parameters[name], value, rtol=1e-4, atol=1e-6)


def test_a_resumed_training_draws_the_same_and_an_evaluation_changes_nothing(
    backbone: Backbone, images: Tensor
) -> None:
    straight, first, second = (trainer_of(make(backbone)) for _ in range(3))
    for _ in range(2):
        run_epoch(straight, images)
    run_epoch(first, images)
    second.restore(*first.state())
    torch.manual_seed(3)
    second.method.predict_logits(images)
    run_epoch(second, images)
    assert second.history == straight.history
    assert all(torch.equal(value, second.parameters[name]) for name, value in straight.parameters.items())


def test_every_sentence_and_scale_is_drawn(backbone: Backbone) -> None:
    method = make(backbone)
    drawn = [method.draw(torch.Generator().manual_seed(seed)) for seed in range(50)]
    assert {tuple(chosen.tolist()) for chosen, _ in drawn} == {(one, other) for one in range(2) for other in range(3)}
    scales = [scale for _, scale in drawn]
    assert 0 <= min(scales) < 0.01
    assert 0.09 < max(scales) < 0.1
