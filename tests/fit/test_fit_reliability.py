"""What a fit says of its probabilities: its temperature, calibration error, and coverage at thresholds."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from maple.checkpoint import read_prompts
from maple.cli import app
from maple.data.saved_split import SAVED_SPLIT, read_saved_split
from maple.fitting import fit, fit_candidates, fit_folder, fit_settings, read_fit, workflow
from maple.metrics import Coverage
from maple.runs import read_rows, selection
from maple.runs.selection_plan import SelectionSettings

BACKBONE = {"name": "maple-tiny", "pretrained": "random:1"}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of 24 images, hard to tell apart."""
    root = tmp_path_factory.mktemp("images") / "pets"
    generator = np.random.default_rng(0)
    for label, name in enumerate(("cat", "dog", "red_owl")):
        (root / name).mkdir(parents=True)
        for number in range(24):
            pixels = (generator.integers(0, 200, (4, 4, 3)) + np.array([25 * label, 0, 0])).astype(np.uint8)
            Image.fromarray(pixels).resize((40, 40), Image.Resampling.BICUBIC).save(root / name / f"{number}.png")
    return root


def layer(shots: int | None) -> dict[str, Any]:
    return {"backbone": BACKBONE, "data": {"shots": shots}, "train": {"epochs": 2, "batch_size": 8}}


def test_a_fit_is_calibrated_on_spare_images(images: Path, tmp_path: Path) -> None:
    words = ["fit", images, "--method", "coop", "--shots", 4, "--output", tmp_path / "run", "--device", "cpu"]
    words += ["--backbone", "maple-tiny", "--pretrained", "random:1", "--epochs", 2, "--set", "train.keep=best"]
    done = CliRunner().invoke(app, list(map(str, words)), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    stored = read_prompts(tmp_path / "run" / "prompts.safetensors")
    split = read_saved_split(tmp_path / "run" / SAVED_SPLIT)
    assert stored.info["calibration"]["images"] == len(split.train) - 12
    (row,) = read_rows(tmp_path / "run")
    (frozen,) = read_rows(tmp_path / "run" / "zero_shot")
    assert row["temperature"] == stored.temperature != 1
    assert "temperature" not in frozen
    result = read_fit(tmp_path / "run")
    assert result.reliability is not None
    assert (result.reliability.error, result.reliability.uncalibrated_error) == (
        row["calibration_error"],
        row["uncalibrated_error"],
    )
    with np.load(tmp_path / "run" / row["predictions"]) as file:
        arrays = dict(file)
    for each in result.reliability.coverage:
        kept = arrays["probabilities"][:, 0] >= each.threshold
        right = kept & (arrays["top"][:, 0] == arrays["labels"])
        assert each == Coverage(each.threshold, len(split.test), int(kept.sum()), int(right.sum()))
    assert result.reliability.summary in done.stdout
    page = (tmp_path / "run" / "report.html").read_text()
    assert "How far its probabilities can be trusted" in page
    # The state that was kept was chosen on the same images.
    assert stored.info["kept"]["images"] == len(split.train) - 12
    assert result.kept.startswith("The state after epoch ")
    assert result.kept in done.stdout
    assert result.kept in page
    assert result.reliability.summary in page
    shown = json.loads(CliRunner().invoke(app, [*map(str, words), "--json"], catch_exceptions=False).stdout)
    values = shown["probabilities"]
    assert shown["kept"] == result.kept
    assert values == result.reliability.as_json()
    assert [each["threshold"] for each in values["reject"]] == [0.5, 0.6, 0.7, 0.8, 0.9, 0.95]


def test_without_spare_images_a_part_is_predicted_by_another_model(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = fit_settings(str(images), "coop", layer=layer(None))
    fit(settings, tmp_path / "run", device="cpu")
    found = read_prompts(tmp_path / "run" / "prompts.safetensors")
    train = len(read_saved_split(tmp_path / "run" / SAVED_SPLIT).train)
    assert found.info["calibration"]["cross_validated"] is True
    assert 20 <= found.info["calibration"]["images"] < train
    assert not (tmp_path / "run" / workflow.TRIALS).exists()
    # Interrupted before the last training, it comes to the same bytes.
    train_run = workflow.train_run

    def killed(settings: Any, folder: Path, **options: Any) -> Any:
        if folder == tmp_path / "again":
            raise KeyboardInterrupt
        return train_run(settings, folder, **options)

    monkeypatch.setattr(workflow, "train_run", killed)
    with pytest.raises(KeyboardInterrupt):
        fit(settings, tmp_path / "again", device="cpu")
    monkeypatch.undo()
    fit(settings, tmp_path / "again", device="cpu")
    first, second = ((tmp_path / name / "prompts.safetensors").read_bytes() for name in ("run", "again"))
    assert first == second


def test_the_choice_of_a_method_calibrates_without_further_training(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trained = []
    train_run = workflow.train_run

    def counted(settings: Any, folder: Path, **options: Any) -> Any:
        result = train_run(settings, folder, **options)
        trained.append((folder.name, result.was_finished))
        return result

    monkeypatch.setattr(workflow, "train_run", counted)
    candidates = fit_candidates(str(images), ["zero_shot", "taskres"], layer=layer(None))
    monkeypatch.setattr(selection.Candidate, "score", property(lambda self: float(self.recipe == "taskres")))
    result = fit(candidates, tmp_path / "run", device="cpu", selection=SelectionSettings(minutes=10))
    assert result.selection is not None
    assert result.selection.chosen.recipe == "taskres"
    again = [name for name, was_finished in trained if was_finished]
    assert again == [f"taskres_{number}" for number in range(result.selection.folds)]
    assert all(not name.startswith("calibration") for name, _ in trained)
    assert "changed" not in caplog.text, "the images of a part are not all images"
    info = read_prompts(tmp_path / "run" / "prompts.safetensors").info["calibration"]
    assert info["cross_validated"] is True
    assert info["images"] == len(result.selection.chosen.right)


def test_a_chosen_method_with_validation_images_of_its_own_is_calibrated(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trials of the choice were trained on images that are held out for validation now: they are not used again."""
    monkeypatch.setattr(selection.Candidate, "score", property(lambda self: float(self.recipe == "tip_adapter")))
    no_steps = {"backbone": BACKBONE, "data": {"shots": None}, "train": {"views": 0}}
    candidates = fit_candidates(str(images), ["zero_shot", "tip_adapter"], layer=no_steps)
    fit(candidates, tmp_path / "run", device="cpu", selection=SelectionSettings(minutes=10))
    info, split = (
        read_prompts(tmp_path / "run" / "prompts.safetensors").info,
        read_saved_split(tmp_path / "run" / SAVED_SPLIT),
    )
    assert 0 < len(split.val) < 20 <= info["calibration"]["images"] <= len(split.train)
    assert info["calibration"]["cross_validated"] is True


def test_fits_that_were_made_before_keep_their_names_and_are_found(images: Path, tmp_path: Path) -> None:
    calibrated = fit_settings(str(images), "coop", layer=layer(4))
    plain = fit_settings(str(images), "coop", layer=layer(4), overrides=["train.calibrate=false"])
    assert calibrated.train.calibrate
    assert fit_folder(plain).name == f"{fit_folder(calibrated).name}_uncalibrated"
    result = fit(plain, tmp_path / "run", device="cpu")
    assert "calibration" not in read_prompts(tmp_path / "run" / "prompts.safetensors").info
    assert result.reliability is not None
    assert result.reliability.summary.startswith("The probabilities are not calibrated. On the held-out images")
    # A fit of an earlier version: nothing in its files knows of calibration.
    inspection = json.loads((tmp_path / "run" / "data.json").read_text())
    del inspection["request"]["train"]["calibrate"]
    (tmp_path / "run" / "data.json").write_text(json.dumps(inspection))
    content = json.loads((tmp_path / "run" / "config.json").read_text())
    del content["train"]["calibrate"]
    (tmp_path / "run" / "config.json").write_text(json.dumps(content))
    assert fit(calibrated, tmp_path / "run", device="cpu").was_finished
    (tmp_path / "run" / "prompts.safetensors").unlink()
    fit(calibrated, tmp_path / "run", device="cpu")
    assert "calibration" not in read_prompts(tmp_path / "run" / "prompts.safetensors").info
