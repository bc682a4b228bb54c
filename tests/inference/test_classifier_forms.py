"""PromptClassifier: images, labels, names and settings of unusual forms."""

from enum import Enum
from pathlib import Path

import numpy as np
import pytest
import torch
from inference_helpers import QUICK, pixels
from PIL import Image

from maple import PromptClassifier
from maple.data import read_image
from maple.errors import ClassNamesError, DataError, ImageError


@pytest.fixture(scope="module")
def fitted() -> PromptClassifier:
    return PromptClassifier(**{**QUICK, "epochs": 1}).fit(*pixels())


def test_an_image_may_stand_in_a_list_twice(fitted: PromptClassifier, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (900, 900, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    for _ in range(4):
        lazy = Image.open(tmp_path / "noise.png")  # decoded by whichever thread comes first
        rows = fitted.predict_proba([lazy] * 6)
        assert (rows == rows[0]).all()


def test_tensors_of_types_that_numpy_lacks(fitted: PromptClassifier) -> None:
    images = torch.rand(2, 3, 9, 9).bfloat16()
    expected = fitted.predict_proba(images.float())
    assert np.array_equal(fitted.predict_proba(images), expected)
    assert np.array_equal(fitted.predict_proba(images.float().to_sparse()), expected)


class Kind(str, Enum):  # noqa: UP042 - NumPy takes such words for others
    CAT = "cat"
    DOG = "dog"


def test_labels_in_other_wrappings() -> None:
    images, _ = pixels(6)
    quick = {**QUICK, "epochs": 1}
    for labels in ([Kind.CAT, Kind.DOG] * 3, np.array(["cat", "dog"] * 3, dtype=np.dtypes.StringDType())):
        assert PromptClassifier(**quick).fit(images, labels).classes_.tolist() == ["cat", "dog"]


def test_class_names_of_another_form() -> None:
    images, _ = pixels(6)
    labels = np.array([0, 1] * 3)
    for names, message in (
        ("ab", "class_names is str; give {label: name}, or a list"),
        ({"a", "b"}, "class_names is set; give"),
        ((name for name in "ab"), "class_names is generator; give"),
    ):
        with pytest.raises(ClassNamesError, match=message):
            PromptClassifier(**QUICK, class_names=names).fit(images, labels)


def test_shots_may_be_set_in_settings() -> None:
    images, labels = pixels(6)
    quick = {**QUICK, "epochs": 1}
    made = PromptClassifier(**{**quick, "settings": {**QUICK["settings"], "data": {"shots": 1}}}).fit(images, labels)
    assert made._info["train"]["images"] == 3
    assert PromptClassifier(**quick).fit(images, labels)._info["train"]["images"] == 6


def test_other_addresses_and_nothing_are_refused(fitted: PromptClassifier) -> None:
    with pytest.raises(ImageError, match=r"ftp://host/a\.png: only http:// and https://"):
        fitted.predict(["ftp://host/a.png"])
    with pytest.raises(ImageError, match="is empty"):
        read_image(b"")


def test_score_of_nothing(fitted: PromptClassifier) -> None:
    images, labels = pixels(6)
    for asked, message in (
        (([], []), "0 images of weight 0 have no score"),
        ((images, labels, np.zeros(6)), "6 images of weight 0 have no score"),
        ((images, labels, [1, 2]), r"6 images have weights of shape \[2\]"),
    ):
        with pytest.raises(DataError, match=message):
            fitted.score(*asked)


def test_a_loaded_classifier_learns_again(tmp_path: Path) -> None:
    images, _ = pixels(6)
    labels = np.array([3, 7] * 3)
    quick = {**QUICK, "epochs": 1}
    PromptClassifier(**quick, class_names={3: "cat", 7: "dog"}).fit(images, labels).save_pretrained(tmp_path)
    again = PromptClassifier.from_pretrained(tmp_path).set_params(epochs=1).fit(images, labels)
    assert again.class_names_ == ("cat", "dog")


@pytest.mark.parametrize("names", [None, 5, {"a", "b"}, {"a": "b"}, (name for name in "ab")])
def test_names_that_are_no_list(fitted: PromptClassifier, names: object) -> None:
    with pytest.raises(ClassNamesError, match=r"class names are .*; give a list of strings"):
        fitted.set_class_names(names)


def test_a_label_of_another_encoding_is_saved(tmp_path: Path) -> None:
    images, _ = pixels(6)
    made = PromptClassifier(**{**QUICK, "epochs": 1}).fit(images, ["caf\udce9", "tea"] * 3)
    made.save_pretrained(tmp_path)
    assert PromptClassifier.from_pretrained(tmp_path).predict(images).tolist() == made.predict(images).tolist()
