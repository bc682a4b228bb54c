"""Runs on precomputed features: the same results as on the images, and clear errors for files that cannot be used."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from feature_tools import METHODS, settings_of, tensors_of
from PIL import Image
from torch import Tensor

from maple.checkpoint import read_prompts
from maple.clip import load_clip
from maple.data import load_dataset, load_features
from maple.errors import ClassNamesError, DataError, MapleError
from maple.feature_files import read_features
from maple.prompts import TemplateClasses
from maple.runs import evaluate_run, train_run
from maple.runs.frozen_features import frozen_batches
from maple.runs.spec import eval_transform


@pytest.fixture
def image_folder(tmp_path: Path) -> str:
    generator = np.random.default_rng(0)
    for number, name in enumerate(("cat", "dog", "red car")):
        for split, count in (("train", 6), ("test", 5)):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 120, (64, 64, 3), dtype=np.uint8)
                pixels[..., number] += 60
                Image.fromarray(pixels).save(tmp_path / "images" / split / name / f"{index}.png")
    return str(tmp_path / "images")


@pytest.fixture
def of_images(image_folder: str, write: Callable[..., str]) -> str:
    """A file of the features of these images."""
    dataset, clip = load_dataset(image_folder, None), load_clip("maple-small")
    tensors: dict[str, Tensor] = {}
    for split in ("train", "test"):
        items = getattr(dataset, split)
        batches = list(frozen_batches(clip, items, dataset.store(), eval_transform(clip)))
        tensors[split] = torch.cat([batch.images for batch in batches])
        tensors[f"{split}_labels"] = torch.cat([batch.labels for batch in batches])
    classes = TemplateClasses(clip, ["a photo of a {}."], normalize_each=False)
    classes.set_class_names(dataset.class_names)
    tensors["text"] = classes.mean
    return write(tensors, class_names=json.dumps(dataset.class_names), logit_scale=repr(clip.logit_scale))


@pytest.mark.parametrize("method", METHODS)
def test_a_run_on_features_answers_as_the_run_on_the_images(
    method: str, image_folder: str, of_images: str, tmp_path: Path
) -> None:
    scores, learned = [], []
    for number, name in enumerate((image_folder, of_images)):
        folder = tmp_path / str(number)
        train_run(settings_of(name, method, shots=None), folder, device="cpu")
        scores.append(evaluate_run(folder, device="cpu")[0])
        learned.append(read_prompts(folder / "prompts.safetensors").tensors)
    assert scores[0].confusion == scores[1].confusion
    assert scores[0].calibration_error == pytest.approx(scores[1].calibration_error, abs=1e-6)
    assert learned[0].keys() == learned[1].keys()
    for key, value in learned[0].items():
        torch.testing.assert_close(value, learned[1][key], rtol=0, atol=0)


def test_base_classes_and_another_file(write: Callable[..., str], tmp_path: Path) -> None:
    tensors = tensors_of()
    folder = tmp_path / "run"
    train_run(settings_of(write(tensors), "clip_adapter", classes="base"), folder, device="cpu")
    assert evaluate_run(folder, classes="base", device="cpu")[1]["class_names"] == ["class 0", "class 1"]
    held_out = {key: value for key, value in tensors.items() if key.startswith("test")}
    scores, row = evaluate_run(folder, dataset=write(held_out, "other"), device="cpu")
    assert (scores.images, row["dataset"], len(row["class_names"])) == (12, "other", 3)
    narrow = write({**held_out, "test": held_out["test"][:, :4]}, "narrow")
    with pytest.raises(DataError, match="has 4 features"):
        evaluate_run(folder, dataset=narrow, device="cpu")
    with pytest.raises(ClassNamesError, match="trained on features"):
        evaluate_run(folder, names=["a", "b", "c"], device="cpu")


def test_a_changed_file_is_noticed(write: Callable[..., str], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors, folder = tensors_of(), tmp_path / "run"
    settings = settings_of(write(tensors), "clip_adapter")
    train_run(settings, folder, device="cpu")
    write({**tensors, "train": tensors["train"] + 1})
    assert train_run(settings, folder, device="cpu").was_finished
    assert "12 images with other content" in caplog.text
    write({**tensors, "text": tensors["text"] + 1})
    with pytest.raises(MapleError, match="fingerprint"):
        evaluate_run(folder, device="cpu")


def test_files_are_merged_and_undivided_features_are_divided(write: Callable[..., str]) -> None:
    tensors = tensors_of()
    text = {"text": tensors["text"], "ignored": torch.zeros(1)}
    first = write({**text, "train_4shot": tensors["train"].half(), "train_labels": tensors["train_labels"]}, "first")
    second = write({**text, "val": tensors["test"], "val_labels": tensors["test_labels"]}, "second")
    dataset, table = load_features(f"{first},{second}")
    assert dataset.counts() == {"train": 12, "val": 0, "test": 12, "classes": 3}
    assert torch.equal(table.rows([dataset.test[5].path])[0], tensors["test"][5])
    whole = write({"features": tensors["train"], "labels": tensors["train_labels"]}, "whole")
    divided = [load_features(whole, seed=seed)[0] for seed in (1, 1, 2)]
    assert divided[0].counts() == {"train": 9, "val": 0, "test": 3, "classes": 3}
    assert divided[0].test == divided[1].test != divided[2].test


def test_methods_that_need_what_is_not_there(write: Callable[..., str], tmp_path: Path) -> None:
    tensors = tensors_of()
    with pytest.raises(MapleError, match="methods that go: zero_shot"):
        train_run(settings_of(write(tensors), "coop"), tmp_path / "coop", device="cpu")
    del tensors["text"]
    with pytest.raises(MapleError, match="choose linear_probe"):
        train_run(settings_of(write(tensors), "taskres"), tmp_path / "taskres", device="cpu")
    train_run(settings_of(write(tensors), "linear_probe"), tmp_path / "probe", device="cpu")
    assert evaluate_run(tmp_path / "probe", device="cpu")[0].top1 > 0.8


@pytest.mark.parametrize(
    ("changes", "metadata", "message"),
    [
        ({"train": torch.full((12, 8), torch.nan)}, {}, "row 0 of train"),
        ({"train": torch.zeros(12, 9)}, {}, "must be"),
        ({"train": torch.zeros(12)}, {}, "must be"),
        ({"train": torch.zeros(0, 8)}, {}, "must be"),
        ({"train": torch.zeros(())}, {}, r"train has shape \[\]; it must be \[rows, 8\]"),
        ({"test": torch.zeros(()), "train": torch.zeros(())}, {}, r"has shape \[\]; it must be \[rows, D\]"),
        ({"train": torch.zeros(12, 8, dtype=torch.int32)}, {}, "type of train"),
        ({"train_labels": torch.zeros(12)}, {}, "type of train_labels"),
        ({"train_labels": torch.zeros(11, dtype=torch.int64)}, {}, "labels of train"),
        ({"train_labels": torch.zeros(12, dtype=torch.int64)}, {}, "no row in train"),
        ({"train_labels": torch.full((12,), 2**60)}, {}, "labels must be 0 to 2"),
        ({"train_labels": torch.full((12,), -1)}, {}, "label is -1"),
        ({"text": torch.zeros(2, 8)}, {}, "a label is 2"),
        ({"val": torch.zeros(2, 8)}, {}, "val has features but no labels"),
        ({"train_4shot": torch.zeros(12, 8)}, {}, "given twice"),
        ({"features": torch.zeros(3, 8), "labels": torch.arange(3)}, {}, "undivided"),
        ({}, {"class_names": "cat"}, "class_names"),
        ({}, {"class_names": '["a", "A", "b"]'}, "class_names"),
        ({}, {"class_names": '"abc"'}, 'class_names is not a list of .*it is "abc"'),
        ({}, {"class_names": '{"a": 1, "b": 2, "c": 3}'}, "class_names is not a list of"),
        ({}, {"class_names": '["a", "b"]'}, "text has 3 rows for 2"),
        ({}, {"logit_scale": "nan"}, "logit_scale is 'nan'"),
    ],
)
def test_files_that_cannot_be_used(
    changes: dict[str, Tensor], metadata: dict[str, str], message: str, write: Callable[..., str]
) -> None:
    with pytest.raises(DataError, match=message):
        read_features(write({**tensors_of(), **changes}, **metadata))


def test_what_is_no_such_file(tmp_path: Path) -> None:
    path = tmp_path / "some.safetensors"
    with pytest.raises(DataError, match="some"):
        read_features(str(path))
    path.write_bytes(b"\xff" * 100)
    with pytest.raises(DataError, match="not a readable safetensors file"):
        read_features(str(path))
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(DataError, match="is a git-lfs pointer; fetch the file itself with `git lfs pull`"):
        read_features(str(path))
