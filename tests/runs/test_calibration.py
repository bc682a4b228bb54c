"""Temperatures: what they are fitted on, what they change, and that every way to predict agrees on them."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from starlette.testclient import TestClient
from typer.testing import CliRunner

from maple import PromptClassifier, load_prompts, save_prompts
from maple.checkpoint import read_prompts, read_tensors, write_tensors
from maple.cli import app
from maple.config import RunSettings
from maple.errors import CheckpointError, ConfigError
from maple.export import export_run
from maple.inference import find_images, load_predictor
from maple.metrics import coverage_at, fit_temperature, score, softmax
from maple.runs import evaluate_run, read_rows, spec, train_run
from maple.runs.spec import content_name, open_dataset, sample
from maple.serve.api import create_app
from maple.serve.middleware import LOOPBACK

ZERO_SHOT = {"name": "zero_shot"}


def drawn(scale: float, count: int = 20_000) -> tuple[np.ndarray, np.ndarray]:
    """Logits [n, 5] that are `scale` times as great as those that their labels were drawn from."""
    generator = np.random.default_rng(0)
    logits = generator.normal(0, 2, (count, 5))
    sums = softmax(logits).cumsum(axis=1)
    labels = (generator.random((count, 1)) > sums).sum(axis=1).clip(max=4)
    return (scale * logits).astype(np.float32), labels


@pytest.mark.parametrize("scale", [0.25, 1.0, 6.0])
def test_a_known_scale_is_found(scale: float) -> None:
    logits, labels = drawn(scale)
    assert fit_temperature(logits, labels) == pytest.approx(scale, rel=0.03)


def test_an_overconfident_classifier_is_calibrated_and_its_classes_stay() -> None:
    logits, labels = drawn(6.0)
    temperature = fit_temperature(logits[:5000], labels[:5000])
    before, after = (score(logits[5000:], labels[5000:], temperature=each) for each in (1.0, temperature))
    assert after.calibration_error < 0.02 < 0.15 < before.calibration_error
    assert (before.top1, before.top5, before.confusion) == (after.top1, after.top5, after.confusion)


def test_the_temperature_is_that_of_the_least_loss() -> None:
    logits, labels = drawn(3.0, 300)

    def loss(temperature: float) -> float:
        return -float(np.log(softmax(logits / temperature)[np.arange(300), labels]).mean())

    found = fit_temperature(logits, labels)
    assert loss(found) <= min(loss(found * 1.001), loss(found / 1.001))
    assert found == fit_temperature(logits, labels)


def test_coverage_and_accuracy_by_hand() -> None:
    confidence, correct = np.array([0.95, 0.9, 0.6, 0.59, 0.3]), np.array([True, False, True, True, False])
    half, six, nine, most = coverage_at(confidence, correct, [0.5, 0.6, 0.9, 0.99])
    assert (half.kept, half.fraction, half.accuracy) == (4, 0.8, 0.75)
    assert (six.kept, six.right) == (3, 2), "an image at the threshold is answered"
    assert (nine.kept, nine.accuracy) == (2, 0.5)
    assert (most.kept, most.fraction, most.accuracy) == (0, 0.0, None)


@pytest.fixture
def images(make_images: Callable[..., Path]) -> Path:
    """Images that a test may change."""
    return make_images(train=12, test=6)


@pytest.fixture(scope="module")
def shared_images(make_images_in: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images, for tests that read them."""
    return make_images_in(tmp_path_factory.mktemp("images"), train=12, test=6)


def settings_of(images: Path, method: dict[str, Any] | None = None, **train: Any) -> RunSettings:
    return RunSettings(
        backbone={"name": "maple-tiny", "pretrained": "random"},
        data={"dataset": str(images), "shots": 4},
        method=method or {"name": "coop"},
        train={"epochs": 1, "batch_size": 8, **train},
    )


def test_only_images_that_are_neither_trained_nor_tested_on_are_used(images: Path, tmp_path: Path) -> None:
    settings = settings_of(images, calibrate=True)
    dataset = open_dataset(settings)
    trained, val, _ = sample(settings, dataset)
    used = {item.path for item in spec.spare_items(settings, dataset, trained, val)}
    assert len(used) == 4 * (12 - 4)
    assert used == {item.path for item in dataset.train} - {item.path for item in trained}
    # The test images cannot even be read while the run is trained and calibrated.
    train_run(settings, tmp_path / "first", device="cpu")
    for path in (images / "test").rglob("*.png"):
        path.write_bytes(b"")
    train_run(settings, tmp_path / "second", device="cpu")
    first, second = ((tmp_path / name / "prompts.safetensors").read_bytes() for name in ("first", "second"))
    assert first == second
    found = read_prompts(tmp_path / "first" / "prompts.safetensors").info["calibration"]
    assert found["images"] == 32
    assert found["temperature"] != 1


def test_of_a_published_data_set_only_validation_images_are_used(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_of(images, calibrate=True)
    dataset = open_dataset(settings)
    trained, _, _ = sample(settings, dataset)
    monkeypatch.setattr(spec, "template_of", lambda _name: "a photo of a {}.")
    assert spec.spare_items(settings, dataset, trained, []) == []
    assert spec.spare_items(settings, dataset, trained, dataset.train[:3]) == list(dataset.train[:3])


def test_without_enough_images_there_is_no_temperature(images: Path, tmp_path: Path) -> None:
    settings = settings_of(images, ZERO_SHOT, calibrate=True, epochs=0).changed(seed=2)
    few = settings.changed(data=settings.data.changed(shots=9), method={"name": "coop"})
    train_run(few, tmp_path / "few", device="cpu")
    stored = read_prompts(tmp_path / "few" / "prompts.safetensors")
    assert stored.info["calibration"] == {"temperature": 1.0, "images": 12, "reason": "at least 20 are needed"}
    _, row = evaluate_run(tmp_path / "few", device="cpu")
    assert "temperature" not in row
    # Zero-shot CLIP learns nothing, so that it has no training images.
    train_run(settings, tmp_path / "zero", device="cpu")
    assert read_prompts(tmp_path / "zero" / "prompts.safetensors").info["calibration"]["images"] == 48


def test_a_run_that_does_not_ask_for_it_is_what_it_was(images: Path, tmp_path: Path) -> None:
    plain, asked = settings_of(images), settings_of(images, calibrate=True)
    assert content_name(plain) != content_name(asked)
    train_run(plain, tmp_path / "plain", device="cpu")
    train_run(asked, tmp_path / "asked", device="cpu")
    stored = {name: read_prompts(tmp_path / name / "prompts.safetensors") for name in ("plain", "asked")}
    assert stored["plain"].temperature == 1
    assert stored["asked"].info.keys() - stored["plain"].info.keys() == {"calibration"}
    for name, tensor in stored["plain"].tensors.items():
        assert torch.equal(tensor, stored["asked"].tensors[name])
    rows = {name: evaluate_run(tmp_path / name, device="cpu")[1] for name in stored}
    assert rows["asked"].keys() - rows["plain"].keys() == {"temperature", "uncalibrated_error"}
    assert rows["asked"]["uncalibrated_error"] == rows["plain"]["calibration_error"]
    for key in ("top1", "top5", "macro_f1", "confusion"):
        assert rows["asked"][key] == rows["plain"][key]
    both = []
    for name in stored:
        with np.load(tmp_path / name / rows[name]["predictions"]) as file:
            both.append(dict(file))
    assert (both[0]["top"] == both[1]["top"]).all()
    assert not np.allclose(both[0]["probabilities"], both[1]["probabilities"])
    assert read_rows(tmp_path / "asked")[0]["temperature"] == stored["asked"].temperature


@pytest.fixture(scope="module")
def calibrated(shared_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of which the temperature is 4."""
    folder = tmp_path_factory.mktemp("calibrated") / "run"
    train_run(settings_of(shared_images, calibrate=True), folder, device="cpu")
    tensors, content = read_tensors(folder / "prompts.safetensors")
    content["info"]["calibration"]["temperature"] = 4.0
    write_tensors(folder / "prompts.safetensors", tensors, content)
    return folder


def pictures(folder: Path) -> list[Path]:
    return sorted((folder / "test").rglob("*.png"))


def probabilities(predictor: Any, paths: list[Path]) -> np.ndarray:
    names, rows = predictor.class_names, []
    for prediction in predictor.stream(find_images(list(map(str, paths))), top=len(names)):
        by_name = {each.name: each.probability for each in prediction.best}
        rows.append([by_name[name] for name in names])
    return np.array(rows)


def test_every_way_to_predict_divides_by_the_temperature(calibrated: Path, shared_images: Path, tmp_path: Path) -> None:
    paths = pictures(shared_images)[:6]
    classifier = PromptClassifier.from_pretrained(calibrated, device="cpu")
    method = load_prompts(calibrated / "prompts.safetensors")
    assert method.temperature == 4
    expected = classifier.predict_proba(paths)
    method.temperature = 1.0
    save_prompts(tmp_path / "plain.safetensors", method)
    plain = PromptClassifier.from_pretrained(tmp_path / "plain.safetensors", device="cpu")
    raw = np.log(plain.predict_proba(paths).astype(np.float64))
    np.testing.assert_allclose(softmax(raw / 4), expected, atol=1e-5)
    np.testing.assert_allclose(classifier.predict_log_proba(paths), np.log(expected), atol=1e-5)
    assert (classifier.predict(paths) == plain.predict(paths)).all()
    predictor = load_predictor(calibrated, device="cpu", zero_shot=True)
    assert predictor.about["temperature"] == 4
    np.testing.assert_allclose(probabilities(predictor, paths), expected, atol=1e-5)
    # Other names keep it.
    predictor.set_class_names(["red car", "blue car"])
    plain.set_class_names(["red car", "blue car"])
    raw = np.log(plain.predict_proba(paths).astype(np.float64))
    np.testing.assert_allclose(probabilities(predictor, paths), softmax(raw / 4), atol=1e-5)
    # A classifier that is saved again keeps it, too.
    classifier.save_pretrained(tmp_path / "saved")
    again = PromptClassifier.from_pretrained(tmp_path / "saved", device="cpu")
    np.testing.assert_array_equal(again.predict_proba(paths), expected)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # of torch.jit
def test_exports_agree_with_a_temperature(calibrated: Path, shared_images: Path, tmp_path: Path) -> None:
    paths = pictures(shared_images)[:6]
    predictor = load_predictor(calibrated, device="cpu", zero_shot=True)
    expected = probabilities(predictor, paths)
    export_run(calibrated, tmp_path / "onnx", zero_shot=True)
    exported = load_predictor(tmp_path / "onnx", zero_shot=True)
    np.testing.assert_allclose(probabilities(exported, paths), expected, atol=1e-5)
    frozen = [
        [each.zero_shot_of_best for each in one.stream(find_images(list(map(str, paths))))]  # type: ignore[union-attr]
        for one in (predictor, exported)
    ]
    np.testing.assert_allclose(frozen[0], frozen[1], atol=1e-5)
    pixels = np.stack([predictor.preprocess(Image.open(path).convert("RGB")) for path in paths])
    about = json.loads((tmp_path / "onnx" / "maple-export.json").read_text())
    features = np.stack([each["features"] for each in exported.encode_images(pixels)])
    by_hand = about["logit_scale"] * features @ np.load(tmp_path / "onnx" / "classes.npy").T
    np.testing.assert_allclose(softmax(by_hand), expected, atol=1e-5)
    export_run(calibrated, tmp_path / "script", "torchscript")
    module = torch.jit.load(str(tmp_path / "script" / "model.pt"))
    np.testing.assert_allclose(softmax(module(torch.from_numpy(pixels)).numpy()), expected, atol=1e-5)
    export_run(calibrated, tmp_path / "clip", "openclip")
    head = load_file(tmp_path / "clip" / "zero_shot_head.safetensors")
    unit = load_prompts(calibrated / "prompts.safetensors").encode_images(torch.from_numpy(pixels)).detach()
    np.testing.assert_allclose(
        softmax((head["logit_scale"] * unit @ head["class_embeddings"].T).numpy()), expected, atol=1e-5
    )


def test_an_export_with_weights_of_each_class_agrees_too(shared_images: Path, tmp_path: Path) -> None:
    probe = settings_of(
        shared_images, {"name": "linear_probe", "inverse_regularisation": 1.0}, calibrate=True, epochs=0, views=0
    )
    train_run(probe, tmp_path / "run", device="cpu")
    tensors, content = read_tensors(tmp_path / "run" / "prompts.safetensors")
    content["info"]["calibration"]["temperature"] = 3.0
    write_tensors(tmp_path / "run" / "prompts.safetensors", tensors, content)
    paths = pictures(shared_images)[:4]
    expected = probabilities(load_predictor(tmp_path / "run", device="cpu"), paths)
    export_run(tmp_path / "run", tmp_path / "onnx")
    np.testing.assert_allclose(probabilities(load_predictor(tmp_path / "onnx"), paths), expected, atol=1e-5)


@pytest.mark.parametrize("value", [0, -1.0, "4", True, [2], 1e9, float("1e-9")])
def test_a_damaged_temperature_is_an_error(calibrated: Path, tmp_path: Path, value: Any) -> None:
    path = tmp_path / "prompts.safetensors"
    tensors, content = read_tensors(calibrated / "prompts.safetensors")
    content["info"]["calibration"]["temperature"] = value
    write_tensors(path, tensors, content)
    with pytest.raises(CheckpointError, match="its temperature is"):
        load_prompts(path)


def test_rejected_images_are_marked_everywhere_alike(calibrated: Path, shared_images: Path) -> None:
    paths = pictures(shared_images)[:5]
    predictor = load_predictor(calibrated, device="cpu")
    best = probabilities(predictor, paths).max(axis=1)
    threshold = round(float(np.sort(best)[2]) + 1e-6, 6)
    rejected = (best < threshold).tolist()
    assert 0 < sum(rejected) < 5
    found = list(predictor.stream(find_images(list(map(str, paths))), reject=threshold))
    assert [each.rejected for each in found] == rejected  # type: ignore[union-attr]
    plain = list(predictor.stream(find_images(list(map(str, paths)))))
    assert {each.rejected for each in plain} == {None}  # type: ignore[union-attr]

    def command(*options: object) -> str:
        words = ["predict", str(calibrated), *map(str, paths), "--device", "cpu", *map(str, options)]
        done = CliRunner().invoke(app, words, catch_exceptions=False)
        assert done.exit_code == 0
        return done.stdout

    rows = [json.loads(line) for line in command("--json", "--reject", threshold).splitlines()]
    assert [row["rejected"] for row in rows] == rejected
    assert all(len(row["best"]) == 4 for row in rows)
    assert "rejected" not in json.loads(command("--json").splitlines()[0])
    lines = list(csv.DictReader(io.StringIO(command("--csv", "--top", 1, "--reject", threshold))))
    assert [line["rejected"] for line in lines] == [str(each).lower() for each in rejected]
    assert command("--reject", threshold).count(": none of these\n") == sum(rejected)
    classifier = PromptClassifier.from_pretrained(calibrated, device="cpu")
    labels = classifier.predict(paths)
    replaced = classifier.predict(paths, reject=threshold)
    assert replaced.tolist() == [None if low else label for low, label in zip(rejected, labels, strict=True)]
    worded = classifier.predict(paths, reject=threshold, rejected_label="none of these")
    assert worded.dtype.kind == "U"
    assert worded.tolist() == [one or "none of these" for one in replaced]
    with TestClient(create_app(predictor, hosts=LOOPBACK), base_url="http://127.0.0.1") as client:
        files = [("images", (path.name, path.read_bytes())) for path in paths]
        served = client.post("/v1/predict", files=files, data={"reject": str(threshold)}).json()["predictions"]
        assert [each["rejected"] for each in served] == rejected
        np.testing.assert_allclose([each["best"][0]["probability"] for each in served], best, atol=1e-5)
        assert "rejected" not in client.post("/v1/predict", files=files).json()["predictions"][0]
        for value in ("0", "1", "-0.5", "nan", "high"):
            refused = client.post("/v1/predict", files=files, data={"reject": value})
            assert refused.status_code == 422
            assert refused.json()["error"]["message"].startswith("reject: ")


@pytest.mark.parametrize("value", [0, 1, -0.1, 1.5, float("nan"), "0.5", True])
def test_a_threshold_outside_of_0_to_1_is_refused(calibrated: Path, shared_images: Path, value: Any) -> None:
    image = pictures(shared_images)[0]
    message = "it must be a probability above 0 and below 1, as in 0.6"
    with pytest.raises(ConfigError, match=message):
        load_predictor(calibrated, device="cpu").stream([], reject=value)
    with pytest.raises(ConfigError, match=message):
        PromptClassifier.from_pretrained(calibrated, device="cpu").predict([image], reject=value)
    if isinstance(value, float):
        with pytest.raises(ConfigError, match=message):
            CliRunner().invoke(
                app, ["predict", str(calibrated), str(image), "--reject", str(value)], catch_exceptions=False
            )


def test_inspect_shows_the_temperature(calibrated: Path) -> None:
    shown = CliRunner().invoke(app, ["inspect", str(calibrated)], catch_exceptions=False).stdout
    assert "temperature 4, calibrated on 32 images" in shown
    content = json.loads(CliRunner().invoke(app, ["inspect", str(calibrated), "--json"]).stdout)
    assert content["prompts"]["info"]["calibration"] == {"temperature": 4.0, "images": 32}
