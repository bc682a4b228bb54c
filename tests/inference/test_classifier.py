"""PromptClassifier: what it learns, what it says, what it saves."""

import pickle
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from inference_helpers import NAMES, QUICK, TINY, WORDS, pixels
from PIL import Image
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.metrics import get_scorer

from maple import PromptClassifier, build_method, load_prompts, save_prompts
from maple.checkpoint import read_prompts
from maple.clip import Backbone
from maple.config import resolve
from maple.errors import BackboneError, CheckpointError, ClassNamesError, ConfigError, DataError, ImageError, MapleError
from maple.inference import TorchPredictor, find_images
from maple.runs import eval_transform, train_run


@pytest.fixture(scope="module")
def fitted() -> PromptClassifier:
    return PromptClassifier(**{**QUICK, "epochs": 12}).fit(*pixels())


# --- fit


def test_fit_is_maple_train(make_images: Callable[..., Path], tmp_path: Path) -> None:
    """The same prompts, to the bit, as a run on the same images in the same order."""
    folder = make_images()
    settings = resolve(
        [
            {
                "method": {"name": "maple", "prompt_depth": 2},
                "backbone": {"name": "maple-tiny", "pretrained": "random:1"},
                "data": {"dataset": str(folder), "shots": 3},
                "train": {"epochs": 2, "lr": 0.01, "batch_size": 5},
                "seed": 0,
            }
        ]
    )
    train_run(settings, tmp_path / "run", device="cpu")
    files = [path for name in ("bird", "cat", "dog", "eel") for path in sorted((folder / "train" / name).iterdir())]
    made = PromptClassifier(**{**QUICK, "epochs": 2}, shots=3, batch_size=5, seed=0)
    made.fit(files, [path.parent.name for path in files])
    expected = read_prompts(tmp_path / "run" / "prompts.safetensors")
    assert made.classes_.tolist() == list(expected.class_names)
    found = made.method_.prompt_parameters()
    assert found.keys() == expected.tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.tensors.items())
    assert made.history_[-1].loss == expected.info["train"]["loss"]
    again = PromptClassifier.from_pretrained(tmp_path / "run", device="cpu")
    assert np.array_equal(again.predict_proba(files), made.predict_proba(files))


def test_it_learns(fitted: PromptClassifier) -> None:
    images, labels = pixels()
    untrained = PromptClassifier(**{**QUICK, "epochs": 0, "lr": None}).fit(images, labels)
    assert fitted.score(images, labels) > max(0.6, untrained.score(images, labels))
    assert fitted.history_[-1].loss < 0.9 * fitted.history_[0].loss


def test_every_form_of_images_is_the_same(fitted: PromptClassifier, tmp_path: Path) -> None:
    images, _ = pixels(4)
    expected = fitted.predict_proba(images)
    assert expected.shape == (4, 3)
    files = []
    for number, image in enumerate(images):
        files.append(tmp_path / f"{number}.png")
        Image.fromarray(image).save(files[-1])
    first = torch.from_numpy(images).permute(0, 3, 1, 2)
    forms: list[Any] = [
        *(list(images), tuple(images), images / 255, (images / 255).astype(np.float32)),
        *(first, first / 255, list(first), [Image.fromarray(image) for image in images]),
        *(files, [str(file) for file in files], np.array([str(file) for file in files])),
        *(np.array([[str(file)] for file in files]), np.array([[file] for file in files], dtype=object)),
        [files[0], images[1], first[2], Image.fromarray(images[3])],
    ]
    for form in forms:
        np.testing.assert_allclose(fitted.predict_proba(form), expected, atol=1e-6)


def test_grey_and_transparent_arrays(fitted: PromptClassifier) -> None:
    grey = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5
    colour = np.repeat(grey[:, :, None], 3, axis=2)
    clear = np.dstack([colour, np.zeros((6, 8), np.uint8)])
    white = np.full((6, 8, 3), 255, np.uint8)
    found = fitted.predict_proba([grey, grey[:, :, None], torch.from_numpy(grey)[None], colour, clear, white])
    np.testing.assert_allclose(found[:3], found[[3, 3, 3]], atol=1e-6)
    np.testing.assert_allclose(found[4], found[5], atol=1e-6)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        ("cat.png", ImageError, "cat.png: there is no such file"),
        (np.zeros((30, 40), np.uint8), DataError, r"shape \[30, 40\]"),
        (torch.zeros(1, 3, 4, 4, device="meta"), ImageError, "image 0: the tensor has no values"),
        (torch.zeros(5, 4, 4), DataError, r"the tensor of images has shape \[5, 4, 4\]"),
        (np.zeros((3, 8, 9), np.uint8), DataError, r"\[3, 8, 9\]; .*channels first.*three grey images as a list"),
        (np.array([["a.png", "b.png"]]), DataError, r"the array of images has shape \[1, 2\]"),
        (f"data:image/png;base64,{'A' * 5000}", ImageError, r"^data:image/png.{1,500}\.\.\.: cannot be reached"),
        (np.zeros((2, 3, 8, 9), np.uint8), ImageError, r"image 0: an array of shape \[3, 8, 9\].*channels first"),
        (torch.zeros(1, 8, 9, 3), ImageError, r"image 0: a tensor of shape \[8, 9, 3\]; it must be \[3, H, W\]"),
        ([np.zeros((4, 4, 3)), np.full((4, 4, 3), -2.0)], ImageError, "image 1: holds floats from -2 to -2; they must"),
        ([np.full((4, 4, 3), np.nan)], ImageError, "image 0: holds floats from nan to nan"),
        ([np.zeros((4, 4, 3), np.int64)], ImageError, "image 0: holds int64; give uint8"),
        ([np.zeros((0, 4, 3), np.uint8)], ImageError, "image 0: has no pixels"),
        ([3], ImageError, "image 0: is int, not an image"),
        (["nosuch.png"], ImageError, "nosuch.png: there is no such file"),
        (7, DataError, "images are int"),
    ],
)
def test_bad_images(fitted: PromptClassifier, images: Any, error: type[MapleError], message: str) -> None:
    with pytest.raises(error, match=message):
        fitted.predict(images)


def test_no_images_are_no_answers(fitted: PromptClassifier) -> None:
    assert fitted.predict([]).shape == (0,)
    assert fitted.predict_proba([]).shape == (0, 3)
    assert fitted.encode_image([]).shape == (0, 128)


def test_bad_labels_and_settings() -> None:
    images, labels = pixels(6)
    for bad, error, message in (
        (labels[:5], DataError, r"6 images have labels of shape \[5\]"),
        (np.array(["cat"] * 6), DataError, "all images have the label .*cat.*at least two classes"),
        (np.arange(6), ClassNamesError, "the labels are int64, not strings"),
        (np.linspace(0, 1, 6), DataError, "the labels are float64; give strings, integers or booleans"),
        (np.array(["a", 1] * 3, dtype=object), DataError, "the labels are of kinds that cannot be sorted"),
        (["a", 1] * 3, DataError, "label 1 is 1, int; give labels of one kind"),
        (["a", "b", float("nan")] * 2, DataError, "label 2 is nan, float; give labels of one kind"),
        (np.array([1.5, 2.5] * 3, dtype=object), DataError, "label 0 is 1.5, float; give labels of one kind"),
        (np.array([labels, labels]).T, DataError, r"labels of shape \[6, 2\]"),
        (None, DataError, "no labels are given, and ndarray has none; give y"),
    ):
        with pytest.raises(error, match=message):
            PromptClassifier(**QUICK).fit(images, bad)
        with pytest.raises(ValueError, match=message):
            PromptClassifier(**QUICK).fit(images, bad)
    with pytest.raises(DataError, match="there are no images"):
        PromptClassifier(**QUICK).fit([], [])
    for change, message in (
        ({"method": "mapel"}, "unknown method 'mapel'; choose one of: zero_shot"),
        ({"preset": "nope"}, "unknown preset 'nope'"),
        ({"settings": "train.lr=1"}, "settings is 'train.lr=1'; give sections"),
        ({"settings": {"train": 5}}, "settings has train = 5; give a section"),
        ({"settings": {"seed": 5}}, "settings holds the seed 5; give it as seed=5"),
        ({"settings": {"train": {"lrr": 1}}}, "unknown setting 'train.lrr'"),
        ({"lr": -1.0}, "train.lr = -1.0"),
        ({"shots": 0}, "data.shots = 0"),
        ({"device": "foo"}, "there is no device 'foo'; choose one of: cpu"),
    ):
        with pytest.raises(ConfigError, match=message):
            PromptClassifier(**{**QUICK, **change}).fit(images, labels)
    with pytest.raises(BackboneError, match="unknown CLIP 'ViT-Z'"):
        PromptClassifier(backbone="ViT-Z").fit(images, labels)


def test_labels_that_are_no_words() -> None:
    images, labels = pixels(6)
    numbers = np.array([WORDS.index(label) + 7 for label in labels])
    quick = {**QUICK, "epochs": 1}
    expected = PromptClassifier(**quick).fit(images, labels)
    for names in ({7: "cat", 8: "dog", 9: "owl", 10: "unused"}, ["cat", "dog", "owl"]):
        made = PromptClassifier(**quick, class_names=names).fit(images, numbers)
        assert made.class_names_ == WORDS
        assert made.classes_.tolist() == [7, 8, 9]
        assert np.array_equal(made.predict_proba(images), expected.predict_proba(images))
        assert set(made.predict(images)) <= {7, 8, 9}
        assert made.score(images, labels) == made.score(images, numbers), "class names stand for their labels"
    with pytest.raises(ClassNamesError, match=r"no name for the labels \[8, 9\]"):
        PromptClassifier(**quick, class_names={7: "cat"}).fit(images, numbers)
    with pytest.raises(ClassNamesError, match="2 class_names are given for 3 labels"):
        PromptClassifier(**quick, class_names=["cat", "dog"]).fit(images, numbers)


# --- answers


def test_answers_fit_each_other(fitted: PromptClassifier) -> None:
    images, labels = pixels(9)
    found = fitted.predict_proba(images)
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(np.exp(fitted.predict_log_proba(images)), found, atol=1e-6)
    assert fitted.predict(images).tolist() == fitted.classes_[found.argmax(axis=1)].tolist()
    assert fitted.score(images, labels) == np.mean(fitted.predict(images) == labels)
    weights = np.arange(9)
    expected = weights[fitted.predict(images) == labels].sum() / weights.sum()
    assert fitted.score(images, labels, sample_weight=weights) == pytest.approx(expected)
    with pytest.raises(DataError, match="9 images have labels of shape"):
        fitted.score(images, labels[:4])
    with pytest.raises(DataError, match=r"none of the labels \(3, 4\) is a class"):
        fitted.score(images[:2], [3, 4])
    features = fitted.encode_image(images)
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, atol=1e-5)
    classes = fitted.method_.class_embeddings().numpy()
    logits = fitted.method_.backbone.logit_scale * features @ classes.T
    np.testing.assert_allclose(logits.argmax(axis=1), found.argmax(axis=1))


def test_a_method_whose_classes_depend_on_the_image() -> None:
    images, labels = pixels(6)
    made = PromptClassifier("cocoop", **TINY, epochs=1, batch_size=2).fit(images, labels)
    assert made.predict_proba(images).shape == (6, 3)


def test_a_method_with_two_features_of_an_image() -> None:
    images, labels = pixels(6)
    sizes = {"layers": [2, 3], "tokens": 2, "token_width": 16}
    made = PromptClassifier("mmrl", **TINY, epochs=1, batch_size=2, settings={"method": sizes}).fit(images, labels)
    features = made.encode_image(images)
    np.testing.assert_allclose(np.linalg.norm(features.reshape(6, 2, -1), axis=2), 1, atol=1e-5)
    logits = features @ made.method_.class_embeddings().numpy().T
    np.testing.assert_allclose(logits.argmax(axis=1), made.predict_proba(images).argmax(axis=1))


def test_zero_shot_is_a_method_too() -> None:
    images, labels = pixels(6)
    made = PromptClassifier("zero_shot", **TINY).fit(images, labels)
    assert made.history_ == ()
    assert made.predict_proba(images).shape == (6, 3)


def test_labels_in_two_unicode_forms_are_one_class() -> None:
    images, labels = pixels(6)
    names = ["v\u00e9lo", "ve\u0301lo"]
    written = [names[index % 2] if label == labels[0] else label for index, label in enumerate(labels)]
    made = PromptClassifier("zero_shot", **TINY).fit(images, written)
    assert len(made.classes_) == 3
    assert names[0] in made.classes_
    assert made.score(images, written) == made.score(images, [unicodedata.normalize("NFC", name) for name in written])


@pytest.mark.parametrize("method", ["tip_adapter", "linear_probe"])
def test_methods_that_search_find_validation_images(method: str, tmp_path: Path) -> None:
    """A quarter of each class is held out: not trained on, searched on."""
    images, labels = pixels(24)
    made = PromptClassifier(method, **TINY).fit(images, labels)
    assert made.score(images, labels) > 0.9
    made.save_pretrained(tmp_path)
    info = read_prompts(tmp_path / "prompts.safetensors").info
    assert info["train"]["images"] == 18
    assert set(info["chosen"]) == ({"alpha", "beta"} if method == "tip_adapter" else {"inverse_regularisation"})
    few = PromptClassifier(method, **TINY, shots=2).fit(images, labels)
    assert few._info["train"]["images"] == 6
    with pytest.raises(ValueError, match="no class has more than one image; give more, or give the setting"):
        PromptClassifier(method, **TINY).fit(images[:3], labels[:3])
    with pytest.raises(ConfigError, match=r"the fraction to hold out is 1\.5; it must be above 0 and below 1"):
        PromptClassifier(method, **TINY, validation_fraction=1.5).fit(images, labels)


def test_a_given_setting_needs_no_validation_images() -> None:
    images, labels = pixels(6)
    settings = {"method": {"alpha": 1.0, "beta": 5.5}}
    made = PromptClassifier("tip_adapter", **TINY, settings=settings).fit(images, labels)
    assert made._info["train"]["images"] == 6


def test_new_names_need_no_training(fitted: PromptClassifier, tmp_path: Path) -> None:
    images, _ = pixels(3)
    fitted.save_pretrained(tmp_path)
    other = PromptClassifier.from_pretrained(tmp_path, device="cpu")
    assert other.set_class_names(["spoon", "red car"]) is other
    assert set(other.predict(images)) <= {"spoon", "red car"}
    assert other.predict_proba(images).shape == (3, 2)
    for names, message in (
        (["a", "a"], "'a' is named more than once"),
        (["Red Car", "spoon", "red  car"], "'Red Car' and 'red  car' is named more than once"),
        ([], "is empty"),
        ("cat", "not the one string"),
    ):
        with pytest.raises(ClassNamesError, match=message):
            other.set_class_names(names)
    assert other.classes_.tolist() == ["spoon", "red car"]


def test_nothing_is_answered_before_it_is_learned() -> None:
    for ask in ("predict", "predict_proba", "encode_image"):
        with pytest.raises(NotFittedError, match="has learned nothing yet; call fit"):
            getattr(PromptClassifier(), ask)([])
    with pytest.raises(MapleError, match="has learned nothing yet"):
        PromptClassifier().save_pretrained("nowhere")


# --- files


def test_save_and_load(fitted: PromptClassifier, tmp_path: Path) -> None:
    images, _ = pixels()
    assert fitted.save_pretrained(tmp_path / "saved") == tmp_path / "saved"
    assert {path.name for path in (tmp_path / "saved").iterdir()} == {"prompts.safetensors", "README.md"}
    for source in (tmp_path / "saved", str(tmp_path / "saved" / "prompts.safetensors")):
        loaded = PromptClassifier.from_pretrained(source, device="cpu")
        assert np.array_equal(loaded.predict_proba(images), fitted.predict_proba(images))
        assert loaded.classes_.tolist() == list(WORDS)
        assert loaded.get_params()["method"] == "maple"
    unfitted = clone(loaded)
    assert not hasattr(unfitted, "method_")
    assert unfitted.set_params(epochs=1).fit(images, pixels()[1]).method_.settings == fitted.method_.settings


def test_labels_and_new_names_are_kept(tmp_path: Path) -> None:
    """Those that are spoken of now; the file still says which were trained."""
    images, labels = pixels(6)
    numbers = np.array([WORDS.index(label) for label in labels])
    made = PromptClassifier(**{**QUICK, "epochs": 1}, class_names=WORDS).fit(images, numbers)
    made.save_pretrained(tmp_path)
    loaded = PromptClassifier.from_pretrained(tmp_path, device="cpu")
    assert loaded.predict(images).tolist() == made.predict(images).tolist()
    assert loaded.class_names_ == WORDS
    loaded.set_class_names(["spoon", "fork"]).save_pretrained(tmp_path)
    again = PromptClassifier.from_pretrained(tmp_path, device="cpu")
    assert again.classes_.tolist() == ["spoon", "fork"]
    assert np.array_equal(again.predict_proba(images), loaded.predict_proba(images))
    assert read_prompts(tmp_path / "prompts.safetensors").class_names == WORDS
    assert loaded.method_.class_names == ("spoon", "fork")
    (answer,) = TorchPredictor.load(tmp_path, device="cpu").stream(find_images([_file(tmp_path, images[0])]), top=9)
    assert {ranked.name for ranked in answer.best} == set(WORDS)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "method",
    [
        {"name": "maple", "prompt_depth": 2},
        {"name": "coop", "class_specific": True},
        {"name": "taskres"},
        {"name": "tip_adapter"},
    ],
    ids=lambda method: method["name"],
)
def test_labels_of_a_run_are_sorted(tiny: Backbone, tmp_path: Path, method: dict[str, Any]) -> None:
    """As scikit-learn's metrics expect; a run has its classes in the order of its data set."""
    images, _ = pixels(9)
    names = ("owl", "cat", "owl", "dog") if method["name"] == "taskres" else ("owl", "cat", "dog")
    trained = build_method(method, tiny, names, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        for parameter in trained.prompt_parameters().values():
            parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4))
    save_prompts(tmp_path / "prompts.safetensors", trained)
    loaded = PromptClassifier.from_pretrained(tmp_path, device="cpu")
    assert loaded.classes_.tolist() == list(loaded.class_names_) == sorted(names)
    in_order = PromptClassifier.from_pretrained(tmp_path, device="cpu").set_class_names
    expected = load_prompts(tmp_path / "prompts.safetensors", tiny)
    views = [eval_transform(tiny)(Image.fromarray(image)) for image in images]
    with torch.no_grad():
        columns = expected.eval().predict_logits(torch.stack(views)).softmax(dim=1).numpy()
    order = np.argsort(names, kind="stable")
    found = loaded.predict_proba(images)
    np.testing.assert_allclose(found, columns[:, order], atol=1e-6)
    labels = np.array(names)[columns.argmax(axis=1)]
    assert loaded.predict(images).tolist() == labels.tolist()
    if len(set(names)) == len(names):
        losses = -np.log(columns[np.arange(9), np.arange(9) % 3])
        assert get_scorer("neg_log_loss")(loaded, images, names * 3) == pytest.approx(-losses.mean(), abs=1e-4)
        given = in_order(["owl", "cat", "dog"])
        given.save_pretrained(tmp_path / "given")
        for classifier in (given, PromptClassifier.from_pretrained(tmp_path / "given", device="cpu")):
            assert classifier.classes_.tolist() == ["owl", "cat", "dog"], "as given"
    loaded.save_pretrained(tmp_path / "again")
    again = PromptClassifier.from_pretrained(tmp_path / "again", device="cpu")
    assert np.array_equal(again.predict_proba(images), found)
    assert read_prompts(tmp_path / "again" / "prompts.safetensors").class_names == names


def _file(folder: Path, image: np.ndarray) -> str:
    Image.fromarray(image).save(folder / "one.png")
    return str(folder / "one.png")


def test_the_backbone_may_lie_elsewhere_but_must_be_the_same(prompts: Path, tiny: Backbone, tmp_path: Path) -> None:
    images, _ = pixels(3)
    with_own = PromptClassifier.from_pretrained(prompts, backbone=tiny, device="cpu")
    assert with_own.method_.backbone is tiny
    named = PromptClassifier.from_pretrained(prompts, backbone="maple-tiny", pretrained="random:1", device="cpu")
    assert np.array_equal(named.predict_proba(images), with_own.predict_proba(images))
    assert with_own.class_names_ == tuple(sorted(NAMES))
    with pytest.raises(CheckpointError, match="prompts do not work with other weights"):
        PromptClassifier.from_pretrained(prompts, backbone="maple-tiny", pretrained="random:2", device="cpu")
    with pytest.raises(CheckpointError, match="is not a run folder"):
        PromptClassifier.from_pretrained(tmp_path)


def test_the_card(tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    images, _ = pixels(6)
    labels = ["a|b", "<b>c"] * 3
    made = PromptClassifier(**{**QUICK, "epochs": 1}).fit(images, labels)
    card = ModelCard.load(made.save_pretrained(tmp_path) / "README.md")
    assert card.data.to_dict()["library_name"] == "maple-clip"
    assert card.data.to_dict()["tags"][-1] == "maple"
    assert "# MaPLe prompts for 2 classes" in card.text
    assert "`prompt_depth=2`" in card.text
    assert r"| classes | &lt;b>c, a\|b |" in card.text
    assert "| images | 6 |" in card.text
    assert made.method_.backbone.fingerprint in card.text
    code = card.text.split("```python\n")[1].split("```")[0]
    code = code.replace("path/of/this/folder", str(tmp_path)).replace("image.jpg", _file(tmp_path, images[0]))
    exec(code, {})


def test_a_pickle_is_the_same_classifier(fitted: PromptClassifier) -> None:
    images, _ = pixels(4)
    again = pickle.loads(pickle.dumps(fitted))
    assert np.array_equal(again.predict_proba(images), fitted.predict_proba(images))


def test_load_prompts_reads_what_it_saved(fitted: PromptClassifier, tmp_path: Path) -> None:
    """The module for those who write their own loop."""
    fitted.save_pretrained(tmp_path)
    method = load_prompts(tmp_path / "prompts.safetensors")
    assert isinstance(method, torch.nn.Module)
    assert {name for name, _ in method.named_parameters()} == fitted.method_.prompt_parameters().keys()
