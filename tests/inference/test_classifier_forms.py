"""PromptClassifier: images, labels, names and settings of unusual forms."""

from enum import Enum
from io import BytesIO
from pathlib import Path, PurePath

import numpy as np
import pytest
import torch
from inference_helpers import QUICK, TINY, pixels
from PIL import Image
from sklearn.exceptions import DataConversionWarning

from maple import PromptClassifier
from maple.data import read_image
from maple.errors import ClassNamesError, DataError, ImageError
from maple.inference.sources.array_images import to_images


@pytest.fixture(scope="module")
def fitted() -> PromptClassifier:
    return PromptClassifier(**{**QUICK, "epochs": 1}).fit(*pixels())


def test_an_image_may_stand_in_a_list_twice(fitted: PromptClassifier, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (900, 900, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    for _ in range(4):
        lazy = Image.open(tmp_path / "noise.png")  # decoded by whichever thread comes first
        rows = fitted.predict_proba([lazy] * 6)
        np.testing.assert_allclose(rows, rows[:1].repeat(6, axis=0), rtol=1e-5)  # MKL rounds the last rows otherwise


def test_tensors_of_types_that_numpy_lacks(fitted: PromptClassifier) -> None:
    images = torch.rand(2, 3, 9, 9).bfloat16()
    expected = fitted.predict_proba(images.float())
    assert np.array_equal(fitted.predict_proba(images), expected)
    assert np.array_equal(fitted.predict_proba(images.float().to_sparse()), expected)


def test_encoded_images_of_other_types(fitted: PromptClassifier, tmp_path: Path) -> None:
    path = tmp_path / "one.png"
    Image.fromarray(pixels(1)[0][0]).save(path)
    content = path.read_bytes()
    expected = fitted.predict_proba(content)
    with path.open("rb") as file:
        for image in (bytearray(content), memoryview(content), BytesIO(content), file, PurePath(path)):
            assert np.array_equal(fitted.predict_proba(image), expected)
            np.testing.assert_allclose(fitted.predict_proba([image, image]), [*expected, *expected], atol=1e-6)
    with path.open(encoding="latin-1") as text:
        for unread, problem in (
            (file, "the file cannot"),
            (text, "the file cannot"),
            (BytesIO(b"x"), "is not an image"),
        ):
            with pytest.raises(ImageError, match=f"image 0: {problem}"):
                fitted.predict(unread)


def test_a_data_set_with_a_method_read_is_no_file() -> None:
    class Stored(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> tuple[Image.Image, int]:
            return self.read(index), index

        def read(self, index: int) -> Image.Image:
            return Image.fromarray(pixels(2)[0][index])

    assert len(list(to_images(Stored()))) == 2


def test_a_pattern_and_a_home_folder(fitted: PromptClassifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, image in enumerate(pixels(3)[0]):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
    expected = fitted.predict_proba([str(tmp_path / f"{number}.png") for number in range(3)])
    assert np.array_equal(fitted.predict_proba(str(tmp_path / "*.png")), expected)
    np.testing.assert_allclose(fitted.predict_proba(tmp_path / "[12].png"), expected[1:], atol=1e-6)
    with pytest.raises(ImageError, match=r"\*\.jpg: there is no such file"):
        fitted.predict(str(tmp_path / "*.jpg"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    for source in ("~/2.png", ["~/2.png"], "~/[2].png"):
        np.testing.assert_allclose(fitted.predict_proba(source), expected[2:], atol=1e-6)
    assert to_images(["~/2.png"])[0].content_id() == to_images(str(tmp_path / "2.png"))[0].content_id() is not None


def test_labels_in_one_column(fitted: PromptClassifier) -> None:
    """As scikit-learn's classifiers take them, with its warning."""
    images, labels = pixels(6)
    pandas = pytest.importorskip("pandas")
    quick = PromptClassifier("zero_shot", **TINY, calibrate=False)
    for column in (labels[:, None], labels[:, None].tolist(), pandas.DataFrame({"label": labels})):
        with pytest.warns(DataConversionWarning, match="column-vector"):
            assert quick.fit(images, column).classes_.tolist() == ["cat", "dog", "owl"]
        with pytest.warns(DataConversionWarning, match="column-vector"):
            assert fitted.score(images, column) == fitted.score(images, labels)
    with pytest.raises(DataError, match=r"labels of shape \[6, 2\]"):
        quick.fit(images, np.stack([labels, labels], axis=1))


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
