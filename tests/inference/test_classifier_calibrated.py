"""PromptClassifier: a temperature as `maple fit` has it, and the best state of the training."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from inference_helpers import TINY, pixels

from maple import PromptClassifier
from maple.inference import in_memory
from maple.inference.sources.array_images import InputError
from maple.runs import selection

COOP: dict[str, Any] = {**TINY, "method": "coop", "epochs": 2, "lr": 0.5, "settings": {"train": {"batch_size": 8}}}
IMAGES, LABELS = pixels(36)
LABELS = np.where(np.arange(36) % 5 == 0, "cat", LABELS)  # some are wrong, so that no model has all of them right


def of(classifier: PromptClassifier, name: str) -> dict[str, Any]:
    return dict(classifier._info[name])


def test_images_that_are_left_over_calibrate_it(tmp_path: Path) -> None:
    made = PromptClassifier(**COOP, shots=4).fit(IMAGES, LABELS)
    found = of(made, "calibration")
    assert found == {"temperature": made.method_.temperature, "images": 36 - 12}
    assert found["temperature"] != 1
    plain = PromptClassifier(**COOP, shots=4, calibrate=False).fit(IMAGES, LABELS)
    assert plain.method_.temperature == 1
    assert "calibration" not in plain._info
    assert (made.predict(IMAGES) == plain.predict(IMAGES)).all()
    scaled = plain.predict_log_proba(IMAGES) / found["temperature"]
    expected = np.exp(scaled) / np.exp(scaled).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(made.predict_proba(IMAGES), expected, atol=1e-5)
    again = PromptClassifier.from_pretrained(made.save_pretrained(tmp_path / "saved"), device="cpu")
    np.testing.assert_array_equal(again.predict_proba(IMAGES), made.predict_proba(IMAGES))


def test_without_images_to_spare_models_of_a_part_calibrate_it() -> None:
    settings = {"train": {"batch_size": 8, "calibrate": False}}
    made = PromptClassifier(**COOP).fit(IMAGES, LABELS)
    found = of(made, "calibration")
    assert found["cross_validated"] is True
    assert 20 <= found["images"] < 36
    assert of(made, "train")["images"] == 36
    plain = PromptClassifier(**{**COOP, "settings": settings}).fit(IMAGES, LABELS)
    assert "calibration" not in plain._info
    assert (made.predict(IMAGES) == plain.predict(IMAGES)).all()


def test_zero_shot_is_calibrated_on_all_images() -> None:
    made = PromptClassifier(**{**COOP, "method": "zero_shot"}).fit(IMAGES, LABELS)
    assert of(made, "calibration")["images"] == 36


def test_the_trials_of_a_choice_are_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    fresh_method = in_memory.fresh_method

    def counted(*given: Any) -> Any:
        built.append(given)
        return fresh_method(*given)

    monkeypatch.setattr(in_memory, "fresh_method", counted)
    monkeypatch.setattr(selection.Candidate, "score", property(lambda self: float(self.recipe == "taskres")))
    options = {"methods": ["zero_shot", "taskres"], "settings": {"train": {"views": 0, "epochs": 2}}}
    made = PromptClassifier(**{**TINY, "method": "auto", **options}).fit(IMAGES, LABELS)
    assert made.selection_ is not None
    assert made.selection_.chosen.recipe == "taskres"
    assert of(made, "calibration")["cross_validated"] is True
    assert of(made, "calibration")["images"] == len(made.selection_.chosen.right)
    assert len(built) == 2 * made.selection_.folds + 1


@pytest.mark.parametrize(("shots", "trained", "chosen_on"), [(4, 12, 24), (None, 28, 8)])
def test_the_best_state_is_chosen_on_images_not_trained_on(shots: int | None, trained: int, chosen_on: int) -> None:
    settings = {"train": {"batch_size": 8, "keep": "best"}}
    options = {**COOP, "settings": settings, "shots": shots, "epochs": 3, "calibrate": False}
    made = PromptClassifier(**options).fit(IMAGES, LABELS)
    kept = of(made, "kept")
    assert of(made, "train")["images"] == trained
    assert (kept["images"], kept["compared"], kept["epochs"]) == (chosen_on, 3, 3)
    scores = [report.validation["accuracy"] for report in made.history_ if report.validation]
    assert kept["right"] == max(scores) * chosen_on
    with pytest.raises(InputError, match=r"train\.keep=best chooses .* no class has more than one image"):
        PromptClassifier(**options).fit(IMAGES[:3], ["cat", "dog", "owl"])
