"""What an evaluation keeps of every image: the arrays agree with the scores, and take no pickle to read."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from maple.config import RunSettings
from maple.data import load_folder
from maple.runs import evaluate_run, train_run
from maple.runs.evaluation import FeatureSample, prediction_arrays, write_predictions


@pytest.fixture
def train(
    make_images: Callable[..., Path], settings_for: Callable[..., RunSettings], tmp_path: Path
) -> Callable[[dict[str, Any]], Path]:
    def make(method: dict[str, Any]) -> Path:
        return train_run(settings_for(make_images(), method, epochs=1), tmp_path / "run").folder

    return make


def arrays(run: Path, row: dict[str, Any]) -> dict[str, Any]:
    with np.load(run / row["predictions"], allow_pickle=False) as content:
        return dict(content)


def test_they_agree_with_the_scores(train: Callable[..., Path]) -> None:
    run = train({"name": "maple", "prompt_depth": 2})
    scores, row = evaluate_run(run)
    kept = arrays(run, row)
    pictures = load_folder(Path(str(kept["opened"][0])))
    assert kept["paths"].tolist() == [item.path for item in pictures.test]
    assert kept["labels"].tolist() == [item.label for item in pictures.test]
    assert kept["top"].shape == kept["probabilities"].shape == (12, 4)
    assert (kept["top"][:, 0] == kept["labels"]).mean() == scores.top1
    assert (np.diff(kept["probabilities"]) <= 0).all(), "best first"
    np.testing.assert_allclose(kept["probabilities"].sum(axis=1), 1, rtol=1e-5)
    assert kept["feature_items"].tolist() == list(range(12))
    cosines = kept["features"].astype(np.float32) @ kept["class_features"].astype(np.float32).T
    gap = np.sort(cosines)[:, -1] - np.sort(cosines)[:, -2]
    assert (cosines.argmax(axis=1) == kept["top"][:, 0])[gap > 1e-3].all(), "features of both towers belong together"


def test_text_features_that_depend_on_the_image_are_not_kept(train: Callable[..., Path]) -> None:
    run = train({"name": "cocoop", "meta_net_reduction": 4})
    _, row = evaluate_run(run)
    assert sorted(arrays(run, row)) == ["labels", "opened", "paths", "probabilities", "top"]


def test_another_question_is_another_file_and_the_same_one_replaces_it(train: Callable[..., Path]) -> None:
    run = train({"name": "zero_shot"})
    names = [evaluate_run(run, classes=classes)[1]["predictions"] for classes in ("base", "novel", "base")]
    assert names[0] == names[2] != names[1]
    assert sorted(path.name for path in (run / "predictions").iterdir()) == sorted(Path(n).name for n in set(names))


@pytest.mark.parametrize(("total", "most", "expected"), [(5, 10, [0, 1, 2, 3, 4]), (9, 3, [0, 4, 8]), (1, 3, [0])])
def test_the_sample_is_evenly_spread(total: int, most: int, expected: list[int]) -> None:
    features = torch.arange(total * 2, dtype=torch.float32).reshape(total, 2)
    sample = FeatureSample(total, most)
    for batch in features.split(2):
        sample.add(batch)
    assert sample.items.tolist() == expected
    assert sample.features is not None
    assert sample.features.tolist() == features[expected].tolist()


def test_of_equal_classes_the_first_is_the_answer(tmp_path: Path) -> None:
    logits = np.zeros((2, 7), dtype=np.float32)
    logits[1, 6] = 1
    kept = prediction_arrays(["ä.png", "b.png"], logits, np.array([0, 6]), FeatureSample(2), None)
    write_predictions(tmp_path / "p.npz", kept, opened=("x", None))
    with np.load(tmp_path / "p.npz", allow_pickle=False) as content:
        assert content["top"].tolist() == [[0, 1, 2, 3, 4], [6, 0, 1, 2, 3]]
        assert content["paths"].tolist() == ["ä.png", "b.png"]
        assert content["opened"].tolist() == ["x", ""]
