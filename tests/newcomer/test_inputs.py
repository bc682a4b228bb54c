"""Every form of images that a newcomer may have, once through training and prediction, and what is refused."""

import io
import json
import tarfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from typer.testing import CliRunner

from maple.cli import app
from maple.data import load_dataset
from maple.errors import MapleError
from maple.fitting import fit_candidates, fit_settings
from maple.inference.classifier import PromptClassifier
from maple.inference.sources.python_data import PythonData, open_data

datasets = pytest.importorskip("datasets")
pandas = pytest.importorskip("pandas")
torchvision = pytest.importorskip("torchvision")

NAMES = ["blue", "green", "red"]
FIRST = [2, 1, 0] * 4
"""The number of the class of each image."""


def _encode(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 40, (32, 32, 3)).astype(np.uint8)
    pixels[..., number % 3] = 230  # red, green, blue
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


IMAGES = [_encode(number) for number in range(12)]
LABELS = [NAMES[label] for label in FIRST]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same twelve images in every form: class folders, zip, Parquet, Arrow, shards."""
    folder = tmp_path_factory.mktemp("inputs")
    tree = folder / "colours"
    with zipfile.ZipFile(folder / "colours.zip", "w") as archive, tarfile.open(folder / "shard.tar", "w") as shard:
        for number, (image, label) in enumerate(zip(IMAGES, LABELS, strict=True)):
            (tree / label).mkdir(parents=True, exist_ok=True)
            (tree / label / f"{number}.png").write_bytes(image)
            archive.writestr(f"colours/{label}/{number}.png", image)
            for extension, content in (("png", image), ("cls", label.encode())):
                member = tarfile.TarInfo(f"{number:03d}.{extension}")
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))
    (folder / "list.csv").write_text(
        "path,label\n" + "".join(f"colours/{label}/{number}.png,{label}\n" for number, label in enumerate(LABELS))
    )
    hugging_face().to_parquet(folder / "colours.parquet")
    hugging_face().save_to_disk(folder / "saved")
    return folder


def hugging_face() -> Any:
    datasets.disable_progress_bars()
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=NAMES))
    rows = {"image": [{"bytes": image, "path": None} for image in IMAGES], "label": FIRST}
    return datasets.Dataset.from_dict(rows, features=features)


class Pairs:
    """A data set that somebody wrote: images and labels by number."""

    classes = NAMES

    def __len__(self) -> int:
        return len(IMAGES)

    def __getitem__(self, number: int) -> tuple[Image.Image, int]:
        return Image.open(io.BytesIO(IMAGES[number])), FIRST[number]


def frame(place: Path) -> Any:
    paths = [str(place / "colours" / label / f"{number}.png") for number, label in enumerate(LABELS)]
    return pandas.DataFrame({"path": paths, "label": LABELS, "number": range(12)})


FORMS: Mapping[str, Callable[[Path], Any]] = {
    "folder": lambda place: str(place / "colours"),
    "table": lambda place: str(place / "list.csv"),
    "zip": lambda place: place / "colours.zip",
    "parquet": lambda place: str(place / "colours.parquet"),
    "saved": lambda place: str(place / "saved"),
    "shards": lambda place: str(place / "shard.tar"),
    "Dataset": lambda _: hugging_face(),
    "streamed": lambda _: hugging_face().to_iterable_dataset(),
    "ImageFolder": lambda place: torchvision.datasets.ImageFolder(place / "colours"),
    "Subset": lambda _: torch.utils.data.Subset(Pairs(), range(12)),  # type: ignore[arg-type]
    "pairs": lambda _: Pairs(),
    "list of pairs": lambda _: [
        (Image.open(io.BytesIO(image)), label) for image, label in zip(IMAGES, LABELS, strict=True)
    ],
    "paths": frame,
    "bytes": lambda _: pandas.DataFrame({"image": IMAGES, "kind": LABELS}),
    "images": lambda _: pandas.DataFrame({"image": [image for image, _ in Pairs()], "label": LABELS}),
}


def quick(**options: Any) -> PromptClassifier:
    settings = {"train": {"warmup_epochs": 0}}
    return PromptClassifier("coop", backbone="maple-small", epochs=1, calibrate=False, settings=settings, **options)


@pytest.fixture(scope="module")
def trained() -> PromptClassifier:
    return quick().fit(IMAGES, LABELS)


@pytest.mark.parametrize("form", FORMS)
def test_the_classifier_takes(form: str, place: Path, trained: PromptClassifier) -> None:
    data = FORMS[form](place)
    classifier = quick().fit(data)
    assert classifier.classes_.tolist() == NAMES
    assert classifier._info["train"]["images"] == 12
    assert classifier.score(FORMS[form](place)) == classifier.score(IMAGES, LABELS)
    if form != "table":
        predicted = trained.predict(FORMS[form](place))
        assert sorted(predicted) == sorted(trained.predict(IMAGES))


@pytest.mark.parametrize("form", ["zip", "parquet", "saved", "shards"])
def test_the_command_line_takes(form: str, place: Path, tmp_path: Path) -> None:
    source, run = str(FORMS[form](place)), str(tmp_path / "run")
    quickly = ["--set", "train.warmup_epochs=0"]
    options = ["--method", "coop", "--dataset", source, "--backbone", "maple-small", "--output", run]
    assert command("train", *options, *quickly)
    command("evaluate", run)
    row = json.loads((tmp_path / "run" / "rows.jsonl").read_text().splitlines()[0])
    assert row["source"]["dataset"] == source
    lines = command("predict", run, source, str(place / "colours" / "red" / "0.png"), "--json").splitlines()
    names = [json.loads(line)["source"] for line in lines]
    assert len(names) == 13
    assert "#" in names[0]


def command(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_one_image_in_every_form(trained: PromptClassifier, place: Path) -> None:
    file = place / "colours" / "red" / "0.png"
    image = Image.open(file)
    pixels = np.asarray(image)
    tensor = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    expected = trained.predict([file])
    for form in (file, str(file), file.read_bytes(), image, pixels, tensor, {"bytes": file.read_bytes(), "path": None}):
        given = [form] if isinstance(form, dict) else form
        assert trained.predict(given).tolist() == expected.tolist()
    generated = (Image.open(io.BytesIO(content)) for content in IMAGES)
    assert trained.predict(generated).tolist() == trained.predict(IMAGES).tolist()


def test_it_gives_features_in_a_pipeline(trained: PromptClassifier) -> None:
    features = trained.transform(IMAGES)
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, atol=1e-5)
    assert features.shape == (12, len(trained.get_feature_names_out()))
    pipeline = make_pipeline(quick().set_output(transform="pandas"), LogisticRegression()).fit(IMAGES, LABELS)
    assert pipeline.score(IMAGES, LABELS) == 1
    assert list(pipeline[:-1].transform(IMAGES[:2]).columns[:2]) == ["promptclassifier0", "promptclassifier1"]


def test_a_fit_of_data_in_memory(place: Path) -> None:
    whole = hugging_face()
    divided = datasets.DatasetDict(train=whole, validation=whole.select(range(6)))
    for data, counts in ((whole, (9, 3)), (divided, (12, 6)), (frame(place), (9, 3)), (FORMS["pairs"](place), (9, 3))):
        settings = fit_settings(data, "coop", layer={"backbone": {"name": "maple-small"}})
        kept = load_dataset(settings.data.dataset, None)
        assert kept.class_names == tuple(NAMES)
        assert (len(kept.train), len(kept.test)) == counts
        contents = {kept.file(item).read_bytes() for item in (*kept.train, *kept.test)}
        assert contents == set(IMAGES) or data.__class__ is Pairs


SPLITS = ["test" if LABELS[:number].count(label) == 3 else "train" for number, label in enumerate(LABELS)]


@pytest.mark.parametrize("form", ["frame", "Dataset", "streamed"])
def test_a_column_of_splits_divides(form: str, place: Path, trained: PromptClassifier) -> None:
    def divided(splits: Sequence[str | None]) -> Any:
        if form == "frame":
            return frame(place).assign(split=splits)
        data = hugging_face().add_column("Split", list(splits))
        return data.to_iterable_dataset() if form == "streamed" else data

    tested = [number for number, split in enumerate(SPLITS) if split == "test"]
    assert quick().fit(divided(SPLITS))._info["train"]["images"] == 12 - len(tested)
    expected = trained.score([IMAGES[number] for number in tested], [LABELS[number] for number in tested])
    assert trained.score(divided(SPLITS)) == expected
    kept = load_dataset(fit_settings(divided(SPLITS), "coop").data.dataset, None)
    assert {kept.file(item).read_bytes() for item in kept.test} == {IMAGES[number] for number in tested}
    assert len(kept.train) == 12 - len(tested)
    # One value divides nothing.
    assert trained.score(divided(["train"] * 12)) == trained.score(IMAGES, LABELS)
    with pytest.raises(MapleError, match="no row is in the train split"):
        quick().fit(divided(["val", *["test"] * 11]))
    with pytest.raises(MapleError, match="row 0 has no split, but others have one"):
        quick().fit(divided([None, *SPLITS[1:]]))
    with pytest.raises(MapleError, match="unknown split 'fold 1'"):
        quick().fit(divided(["fold 1", *SPLITS[1:]]))


def test_a_split_that_is_none_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    unnamed = datasets.DatasetDict(train=hugging_face(), extra=hugging_face())
    kept = load_dataset(fit_settings(unnamed, "coop").data.dataset, None)
    assert (len(kept.train), len(kept.test), kept.drawn_split) == (9, 3, True)
    assert "extra is not used" in caplog.text


def test_columns_of_data_in_memory_are_named() -> None:
    data = pandas.DataFrame({"image": IMAGES, "species": LABELS, "place": ["here", "there"] * 6})
    with pytest.raises(MapleError, match=r'not clear; name it, as in layer=\{"data": \{"label_column": NAME\}\}'):
        fit_candidates(data, ["zero_shot"])
    for named in ({"layer": {"data": {"label_column": "species"}}}, {"overrides": ["data.label_column=species"]}):
        settings = fit_candidates(data, ["zero_shot"], **named)["zero_shot"]
        assert load_dataset(settings.data.dataset, None).class_names == tuple(NAMES)


def test_a_frame_of_arrays_and_missing_values() -> None:
    arrays = [np.asarray(image) for image, _ in Pairs()]
    notes = [pandas.NA, float("nan"), *["a note"] * 10]
    data = open_data(pandas.DataFrame({"note": notes, "image": arrays, "label": LABELS}))
    assert data is not None
    assert data.images[0] is arrays[0]
    assert data.read_labels() == LABELS
    without = pandas.DataFrame({"image": [*arrays[:11], pandas.NA], "label": LABELS})
    kept = load_dataset(fit_settings(without, "coop").data.dataset, None)
    assert len(kept.train) + len(kept.test) == 11


def _opened(path: str) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def read(data: Any) -> PythonData:
    opened = open_data(data)
    assert opened is not None
    return opened


class Cropped(torchvision.datasets.ImageFolder):
    """Shows a part of each image."""

    def __getitem__(self, number: int) -> tuple[Image.Image, int]:
        image, label = super().__getitem__(number)
        return image.crop((0, 0, 8, 8)), label


class Listed(torch.utils.data.Dataset[Any]):
    """Lists other labels than it returns."""

    def __init__(self, place: Path) -> None:
        self.classes = ["blue", "green"]
        self.samples = [(path, 7, number % 2) for number, path in enumerate(frame(place)["path"])]
        self.targets = [4 + number % 2 for number in range(12)]

    def __len__(self) -> int:
        return 12

    def __getitem__(self, number: int) -> tuple[Image.Image, int]:
        return _opened(self.samples[number][0]), self.targets[number] - 4


class Part(torch.utils.data.Subset[Any]):
    """Returns other labels than the data set that it is a part of: `change` of these."""

    change = staticmethod(lambda label: label)

    def __getitem__(self, number: Any) -> Any:
        image, label = self.dataset[self.indices[number]]
        return image, self.change(label)

    def __getitems__(self, numbers: list[int]) -> list[Any]:
        return [self[number] for number in numbers]


def test_a_data_set_that_changes_what_it_lists_is_read_by_its_items(place: Path) -> None:
    assert read(Cropped(place / "colours")).images[3].size == (8, 8)
    listed = read(Listed(place))
    assert isinstance(listed.images[0], Image.Image)
    assert listed.read_labels() == ["blue", "green"] * 6


def test_files_and_lists_are_used_where_items_are_these(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = torchvision.datasets.ImageFolder(place / "colours")
    part = torch.utils.data.Subset(folder, [11, 0])
    own_loader = torchvision.datasets.ImageFolder(place / "colours", loader=lambda _path: Image.new("L", (5, 5)))
    renumbered = torchvision.datasets.ImageFolder(place / "colours", target_transform=lambda label: 2 - label)
    assert [read(part).images[0], read(renumbered).images[0]] == [folder.samples[11][0], folder.samples[0][0]]
    assert read(own_loader).images[0].size == (5, 5)
    assert read(renumbered).read_labels() == ["red"] * 4 + ["green"] * 4 + ["blue"] * 4
    merged = torchvision.datasets.ImageFolder(place / "colours", target_transform=lambda label: label % 2)
    assert read(merged).read_labels() == [0] * 4 + [1] * 4 + [0] * 4, "two labels are not the three classes"
    few: Any = Listed(place)
    few.classes, few.targets = ["blue", "green", "red"], torch.tensor([4, 5] * 6)
    assert read(few).read_labels() == [0, 1] * 6, "made of the numbers in its list"
    few.samples, few.targets = [(path, label) for path, _, label in few.samples], torch.tensor([4, 5] * 6)
    assert read(few).read_labels() == ["blue", "green"] * 6
    # Nothing else than the first item is read for the labels.
    monkeypatch.setattr(own_loader, "loader", lambda path: pytest.fail(path) if path != folder.samples[0][0] else path)
    assert read(own_loader).read_labels() == ["blue"] * 4 + ["green"] * 4 + ["red"] * 4
    assert read(part).read_labels() == ["red", "blue"]


def test_the_names_of_a_data_set_are_those_of_a_part_with_its_labels(place: Path) -> None:
    folder = torchvision.datasets.ImageFolder(place / "colours")
    whole: Any = Part(folder, list(range(12)))
    part = torch.utils.data.Subset(whole, [11, 0])
    assert read(part).read_labels() == ["red", "blue"]
    whole.change = lambda label: 2 - label
    assert read(part).read_labels() == [0, 2]
    whole.classes = ["small", "middle", "large"]
    assert read(Part(folder, [11, 0])).read_labels() == ["red", "blue"]
    assert read(whole).read_labels()[::4] == ["large", "middle", "small"]


def test_the_kinds_of_pets_are_named_by_themselves(tmp_path: Path) -> None:
    (tmp_path / "oxford-iiit-pet" / "images").mkdir(parents=True)
    (tmp_path / "oxford-iiit-pet" / "annotations").mkdir()
    rows = [("Abyssinian", 1), ("beagle", 2), ("Bengal", 1)]
    for name, _ in rows:
        (tmp_path / "oxford-iiit-pet" / "images" / f"{name}_1.jpg").write_bytes(IMAGES[0])
    lines = "".join(f"{name}_1 {number} {kind} 1\n" for number, (name, kind) in enumerate(rows, 1))
    (tmp_path / "oxford-iiit-pet" / "annotations" / "trainval.txt").write_text(lines)
    for kinds, expected in (
        ("category", ["Abyssinian", "Beagle", "Bengal"]),
        ("binary-category", ["Cat", "Dog", "Cat"]),
    ):
        assert read(torchvision.datasets.OxfordIIITPet(tmp_path, target_types=kinds)).read_labels() == expected


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (lambda: torch.utils.data.DataLoader(Pairs()), r"DataLoader.*give its dataset"),  # type: ignore[arg-type]
        (lambda: datasets.DatasetDict(one=hugging_face()), r"unknown split 'train'; choose one of: one"),
        (lambda: hugging_face().remove_columns("label"), r"which column holds the labels is not clear"),
        (
            lambda: pandas.DataFrame({"a": LABELS, "b": LABELS}),
            r"which column holds the images is not clear.*a \(text\)",
        ),
        (
            lambda: pandas.DataFrame({"image": IMAGES, "label": [*LABELS[:11], None]}),
            r"1 of 12 images have no label \(row 11\)",
        ),
        (lambda: list(IMAGES), r"no labels are given, and list has none"),
        (lambda: "nosuch", "nosuch"),
        (lambda: hugging_face().cast_column("label", datasets.Value("int64")), "CLIP reads the names of the classes"),
        (list, "no labels are given"),
    ],
)
def test_what_is_refused_says_what_to_do(data: Callable[[], Any], message: str) -> None:
    with pytest.raises(MapleError, match=message):
        quick().fit(data())
