"""Evaluation: class embeddings once, images in batches, and no numbers that are none."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from maple.clip import Backbone
from maple.data import Batch
from maple.errors import BackboneError, DataError
from maple.evaluation import _one_behind, evaluate, predict
from maple.methods import build_method

METHODS = [{"name": "maple", "prompt_depth": 2}, {"name": "cocoop", "meta_net_reduction": 4}, {"name": "zero_shot"}]


@pytest.mark.parametrize("description", METHODS, ids=lambda description: description["name"])
def test_batches_do_not_matter(description: dict[str, object], backbone: Backbone, images: Tensor) -> None:
    method = build_method(description, backbone, ["cat", "dog", "owl"])
    labels = torch.tensor([0, 1, 2, 2, 1, 0])
    seen: list[int] = []
    logits, found = predict(
        method, [Batch(images[:4], labels[:4]), Batch(images[4:], labels[4:])], on_batch=seen.append
    )
    assert seen == [4, 2]
    assert logits.dtype == np.float32
    assert found.tolist() == labels.tolist()
    with torch.no_grad():
        np.testing.assert_allclose(logits, method(images).numpy(), rtol=1e-4, atol=1e-4)
    assert evaluate(method, [Batch(images, labels)]).images == 6


def test_classes_are_encoded_once(backbone: Backbone, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    method = build_method({"name": "maple", "prompt_depth": 2}, backbone, ["cat", "dog"])
    calls, plain = [], method.encode_classes
    monkeypatch.setattr(method, "encode_classes", lambda: (calls.append(1), plain())[1])
    batch = Batch(images, torch.zeros(6, dtype=torch.int64))
    predict(method, [batch] * 3)
    predict(method, [batch] * 3)
    assert len(calls) == 1


def test_training_goes_on_after_evaluation(backbone: Backbone, images: Tensor) -> None:
    method = build_method({"name": "maple", "prompt_depth": 2}, backbone, ["cat", "dog"])
    labels = torch.zeros(6, dtype=torch.int64)
    predict(method, [Batch(images, labels)])
    method.loss(images, labels)[0].backward()
    assert all(value.grad is not None for value in method.prompt_parameters().values())


def test_no_images(backbone: Backbone) -> None:
    method = build_method({"name": "zero_shot"}, backbone, ["cat"])
    with pytest.raises(DataError, match="there are no images to evaluate; is the list of items"):
        evaluate(method, [])


def test_logits_that_are_no_numbers_are_not_scored(backbone: Backbone, images: Tensor) -> None:
    method = build_method({"name": "coop", "prompt_length": 1}, backbone, ["cat", "dog"])
    broken = images.clone()
    broken[1] = torch.nan
    with pytest.raises(BackboneError, match=r"1 of 6 images have logits that are not finite, in fp32 on cpu"):
        evaluate(method, [Batch(broken, torch.zeros(6, dtype=torch.int64))])


@pytest.mark.parametrize("count", [0, 1, 4])
def test_a_gpu_has_the_next_batch_before_the_last_is_fetched(count: int) -> None:
    """The CPU has nothing to gain from it; every result comes once and in order on both."""
    events: list[str] = []

    def results() -> Iterator[int]:
        for number in range(count):
            events.append(f"begin {number}")
            yield number

    assert list(_one_behind(results(), torch.device("cpu"))) == list(range(count))
    events.clear()
    for number in _one_behind(results(), torch.device("cuda")):
        events.append(f"fetch {number}")
    fetched = [f"fetch {number}" for number in range(count)]
    assert [event for event in events if event in fetched] == fetched
    for number in range(count - 1):
        assert events.index(f"begin {number + 1}") < events.index(f"fetch {number}")
        assert f"begin {number + 2}" not in events[: events.index(f"fetch {number}")]
