"""PromptSRC beyond its recordings: the average over epochs, and its losses on other prompts."""

import pytest
import torch
from torch import Tensor
from variants import NAMES, make

from maple.clip import Backbone
from maple.config import TrainSettings
from maple.data import Batch
from maple.errors import CheckpointError
from maple.methods import build_method
from maple.methods.promptsrc import epoch_weights
from maple.train import Trainer


def test_weights_are_a_gaussian_that_sums_to_one() -> None:
    weights = epoch_weights(20, 15, 1)
    assert sum(weights) == pytest.approx(1)
    assert max(weights) == weights[14] == pytest.approx(0.3989, abs=1e-4)
    assert weights[13] == pytest.approx(weights[15])
    assert epoch_weights(2, 45, 0.5) == pytest.approx([0, 1]), "far from the mean, the nearest epoch counts"


def test_the_average_of_the_epochs_is_what_is_left(backbone: Backbone, images: Tensor) -> None:
    method = make("promptsrc", backbone)
    trainer = Trainer(method, TrainSettings(lr=0.01, warmup_epochs=0, epochs=3))
    weights = epoch_weights(3, 15, 1)
    expected = {name: torch.zeros_like(value) for name, value in method.prompt_parameters().items()}
    plain = method.on_epoch_end

    def listen(epoch: int, epochs: int) -> None:
        for name, value in method.prompt_parameters().items():
            expected[name] += weights[epoch] * value.detach()
        plain(epoch, epochs)

    method.on_epoch_end = listen  # type: ignore[method-assign]
    for _ in range(3):
        trainer.run_epoch([(Batch(images, torch.arange(6) % 3), 6)])
    for name, value in method.prompt_parameters().items():
        torch.testing.assert_close(value.detach(), expected[name])


def test_a_state_without_its_average_is_refused(backbone: Backbone) -> None:
    method = make("promptsrc", backbone)
    state = method.training_state()
    method.load_training_state(state)
    with pytest.raises(CheckpointError, match="the average of the prompts does not fit"):
        method.load_training_state({})


def test_its_losses_on_the_prompts_of_maple_are_maples_logits(backbone: Backbone, images: Tensor) -> None:
    generators = [torch.Generator().manual_seed(4) for _ in range(2)]
    maple = build_method({"name": "maple", "prompt_depth": 3}, backbone, NAMES, generator=generators[0])
    description = {"name": "promptsrc", "prompts": {"name": "maple", "prompt_depth": 3}}
    both = build_method(description, backbone, NAMES, generator=generators[1])
    assert both.prompt_parameters().keys() == maple.prompt_parameters().keys()
    assert torch.equal(both(images), maple(images))
    assert len(both.vision_prompts()) == 3
    assert both.settings.prompts["coupling_sharing"] == "per_layer", "its settings are complete"
    with torch.no_grad():
        loss, logs = both.loss(images, torch.zeros(6, dtype=torch.int64))
    parts = [logs[name] for name in ("cross_entropy", "text_l1", "image_l1", "logits_kl")]
    assert all(float(part) > 0 for part in parts)
    assert float(loss) == pytest.approx(float(sum(parts)), rel=1e-5)
