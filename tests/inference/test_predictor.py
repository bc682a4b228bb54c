"""Answers: the right numbers, in order, in constant memory, under any names."""

import copy
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from itertools import count, islice
from pathlib import Path

import numpy as np
import pytest
import torch
from inference_helpers import COLOURS, NAMES
from PIL import Image

from maple import build_method, load_prompts
from maple.clip import Backbone
from maple.data import EvalTransform
from maple.data.images.prefetch import map_in_order, overlaps
from maple.errors import BackboneError, ClassNamesError, ConfigError, DataError, ImageError, UnlearnedClassesError
from maple.inference import ImageSource, Prediction, TorchPredictor, UnreadableImage, find_images
from maple.inference.sources.image_sources import cache_downloads
from maple.inference.trained_names import TrainedNames
from maple.methods.maple import MaPLe


def colour_pictures() -> list[ImageSource]:
    images = {name: Image.new("RGB", (50, 40), colour) for name, colour in COLOURS.items()}
    return [ImageSource(name, lambda image=image: image) for name, image in images.items()]


def answers(predictor: TorchPredictor, pictures: list[ImageSource], **options: int) -> list[Prediction]:
    found = list(predictor.stream(pictures, **options))
    assert all(isinstance(one, Prediction) for one in found)
    return found  # type: ignore[return-value]


def test_answers_are_the_methods(prompts: Path, tiny: Backbone) -> None:
    predictor = TorchPredictor.load(prompts, zero_shot=True, device="cpu")
    seen = tiny.preprocessing
    transform = EvalTransform(seen.size, seen.mean, seen.std, seen.interpolation)
    images = torch.stack([transform(picture.read()) for picture in colour_pictures()])
    method = load_prompts(prompts, tiny)
    plain = build_method({"name": "zero_shot", "templates": ["a centered satellite photo of {}."]}, tiny, NAMES)
    with torch.no_grad():
        expected, beside = method(images).softmax(-1), plain(images).softmax(-1)
    found = answers(predictor, colour_pictures(), top=6)
    assert [one.source for one in found] == list(COLOURS)
    for row, one in enumerate(found):
        values, order = expected[row].sort(descending=True)
        assert [ranked.name for ranked in one.best] == [NAMES[index] for index in order]
        assert [ranked.probability for ranked in one.best] == pytest.approx(values.tolist(), abs=1e-5)
        assert one.zero_shot is not None
        assert [ranked.probability for ranked in one.zero_shot] == pytest.approx(
            sorted(beside[row].tolist(), reverse=True), abs=1e-5
        )
        assert one.zero_shot_of_best == pytest.approx(beside[row][order].tolist(), abs=1e-5)


@pytest.mark.parametrize("options", [{"batch_size": 1}, {"batch_size": 3, "workers": 0}, {"workers": 5}])
def test_batches_and_workers_change_nothing(prompts: Path, options: dict[str, int]) -> None:
    predictor = TorchPredictor.load(prompts, device="cpu")
    expected = answers(predictor, colour_pictures())
    for one, other in zip(expected, answers(predictor, colour_pictures(), **options), strict=True):
        assert [ranked.name for ranked in one.best] == [ranked.name for ranked in other.best]
        assert [r.probability for r in one.best] == pytest.approx([r.probability for r in other.best], abs=1e-5)


def test_cocoop_whose_classes_depend_on_the_image(tiny: Backbone) -> None:
    method = build_method({"name": "cocoop"}, tiny, NAMES)
    predictor = TorchPredictor(method, zero_shot=True)
    predictor.set_class_names(["cat", "dog"])
    found = answers(predictor, colour_pictures(), batch_size=3)
    preprocess = predictor.preprocess
    method.set_class_names(["cat", "dog"])
    with torch.no_grad():
        expected = method(
            torch.from_numpy(np.stack([preprocess(picture.read()) for picture in colour_pictures()]))
        ).softmax(-1)
    for row, one in zip(expected, found, strict=True):
        assert one.best[0].probability == pytest.approx(float(row.max()), abs=1e-5)
        assert one.best[0].name == ("cat", "dog")[int(row.argmax())]


def test_unreadable_pictures_stand_in_their_place(prompts: Path) -> None:
    def broken() -> Image.Image:
        raise ImageError("x.png: is damaged")

    pictures = colour_pictures()
    mixed = [ImageSource("x.png", broken), *pictures[:2], ImageSource("x.png", broken), *pictures[2:]]
    for size in (1, 2, 10):
        found = list(TorchPredictor.load(prompts, device="cpu").stream(mixed, batch_size=size))
        assert [one.source for one in found] == ["x.png", "red", "green", "x.png", "blue", "grey"]
        assert [isinstance(one, UnreadableImage) for one in found] == [True, False, False, True, False, False]
        assert isinstance(found[0], UnreadableImage)
        assert found[0].reason == "x.png: is damaged"


@pytest.mark.parametrize(("cores", "ahead"), [(8, 2), (2, 0)])
def test_an_endless_stream_is_read_no_more_than_two_batches_ahead(
    cores: int, ahead: int, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is listed and decoded ahead, and so what is in memory, has a bound: none if that takes all cores."""
    monkeypatch.setattr("maple.data.images.prefetch.usable_cores", lambda: cores)
    listed = 0
    image = Image.new("RGB", (20, 20))

    def pictures() -> "object":
        nonlocal listed
        for number in count():
            listed += 1
            yield ImageSource(str(number), lambda: image)

    stream = TorchPredictor.load(prompts, device="cpu").stream(pictures(), batch_size=4, workers=2)  # type: ignore[arg-type]
    found = list(islice(stream, 9))
    assert [one.source for one in found] == [str(number) for number in range(9)]
    assert listed == (3 + ahead) * 4
    stream.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("maple-images")]


def test_new_names_at_once_and_back(prompts: Path) -> None:
    predictor = TorchPredictor.load(prompts, zero_shot=True, device="cpu")
    first = answers(predictor, colour_pictures())
    told = predictor.set_class_names(["red car", "Blue  thing", "spoon"])
    assert told is not None
    assert told.startswith("2 of 3 class names were not trained (red car, spoon)")
    found = answers(predictor, colour_pictures())
    assert {ranked.name for ranked in found[0].best} == {"red car", "Blue  thing", "spoon"}
    assert sum(ranked.probability for ranked in found[0].best) == pytest.approx(1)
    assert predictor.set_class_names(NAMES) is None
    assert answers(predictor, colour_pictures()) == first


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "is empty"),
        (["cat", " "], "class name 1 is ' '"),
        (["red_car", "dog", "red car "], "'red car' is named more than once"),
        (["cat", "very " * 80], "needs 8. tokens"),
        # Fits into "a photo of a {}." of the prompts, and not into "a centered satellite photo of {}.".
        (["cat", "very " * 70], "a centered satellite photo of very .* needs 7. tokens"),
    ],
)
def test_bad_names_change_nothing(prompts: Path, names: list[str], message: str) -> None:
    predictor = TorchPredictor.load(prompts, zero_shot=True, device="cpu")
    before = answers(predictor, colour_pictures())
    with pytest.raises(ClassNamesError, match=message):
        predictor.set_class_names(names)
    assert answers(predictor, colour_pictures()) == before


def test_bad_numbers_and_infinite_logits(prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = TorchPredictor.load(prompts, device="cpu")
    for name in ("top", "batch_size"):
        with pytest.raises(ConfigError, match=f"{name} is 0; it must be at least 1"):
            predictor.stream([], **{name: 0})  # type: ignore[arg-type]
    monkeypatch.setattr(MaPLe, "logits_of", lambda _, features: torch.full((len(features), 6), torch.inf))
    with pytest.raises(BackboneError, match="a result is not finite, in fp32 on cpu"):
        list(predictor.stream(colour_pictures()))


# --- where pictures come from


def test_folders_in_order(pictures: Path) -> None:
    found = [Path(one.name).relative_to(pictures).as_posix() for one in find_images([str(pictures)])]
    assert found == ["a.png", "b10.png", "b9.png", "d.png"]
    found = [Path(one.name).relative_to(pictures).as_posix() for one in find_images([str(pictures)], recursive=True)]
    assert found == ["a.png", "b10.png", "b9.png", "c/x.png", "d.png"]


def test_links_in_circles_end(pictures: Path) -> None:
    (pictures / "c" / "up").symlink_to(pictures)
    assert len(list(find_images([str(pictures)], recursive=True))) == 5


def test_what_is_only_named_as_a_picture_is_told(pictures: Path) -> None:
    (pictures / "c" / "gone.jpg").symlink_to(pictures / "nowhere.jpg")
    (pictures / "c" / "notes.txt").symlink_to(pictures / "nowhere.txt")
    os.mkfifo(pictures / "c" / "pipe.png")
    gone, pipe, good = find_images([str(pictures / "c")])
    assert good.read().mode == "RGB"
    for broken in (gone, pipe):
        with pytest.raises(DataError, match=Path(broken.name).name):
            broken.read()


def test_a_folder_without_pictures_says_so(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "notes.txt").write_text("words")
    (picture,) = find_images([str(tmp_path)])
    with pytest.raises(DataError, match="holds no images; recursive=True also looks into"):
        picture.read()


def test_a_folder_that_cannot_be_listed_is_one_failure(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import maple.data.folders.listing as folders

    whole = folders.list_folder

    def list_folder(folder: Path) -> list[Path]:
        if folder.name == "c":
            raise DataError(f"{folder}: cannot be listed (Permission denied); make the folder readable")
        return whole(folder)

    monkeypatch.setattr(folders, "list_folder", list_folder)
    found = list(find_images([str(pictures)], recursive=True))
    assert len(found) == 5
    with pytest.raises(DataError, match="c: cannot be listed"):
        found[3].read()


def test_standard_input_is_named_once() -> None:
    with pytest.raises(ConfigError, match="standard input"):
        find_images(["-", "a.png", "-"])
    with pytest.raises(ConfigError, match="an image is needed"):
        find_images([])


def test_what_was_fetched_is_kept() -> None:
    calls = []

    def read() -> Image.Image:
        calls.append(1)
        if len(calls) > 1:
            raise AssertionError
        return Image.new("RGB", (2, 2))

    (kept,) = cache_downloads(iter([ImageSource("http://host/a.png", read)]))
    assert kept.read() is kept.read()

    def fail() -> Image.Image:
        calls.append(1)
        raise ImageError(f"failure {len(calls)}")

    (kept,) = cache_downloads(iter([ImageSource("<stdin>", fail)]))
    for _ in range(2):
        with pytest.raises(ImageError, match="failure 2"):
            kept.read()


# --- names far from the trained ones


def test_cosines_to_the_nearest_are_those_of_zero_shot(tiny: Backbone) -> None:
    trained, new = ["cat", "dog", "owl"], ["cat", "tank"]
    features = build_method({"name": "zero_shot"}, tiny, [*trained, *new]).encode_classes()
    predictor = TorchPredictor(build_method({"name": "coop"}, tiny, trained))
    nearest, among = predictor._distances.cosines(features[3:].numpy())
    cosines = features @ features.T
    assert nearest.tolist() == pytest.approx([1.0, float(cosines[4, :3].max())], abs=1e-5)
    expected = [max(float(cosines[a, b]) for b in range(3) if b != a) for a in range(3)]
    assert among.tolist() == pytest.approx(expected, abs=1e-5)


def features_by_word(names: Sequence[str]) -> np.ndarray:
    """Trained names have a cosine of 0.8 to each other; near ones one of 0.9 to one of them, far ones 0.3."""
    across = (1 - 0.8**2) ** 0.5
    known = {"cat": (1.0, 0.0), "dog": (0.8, across)}
    angles = {"near": 0.9, "far": 0.3}
    made = []
    for name in names:
        cosine = angles.get(name.replace("_", " ").split()[0], 0.0)
        made.append(known.get(name, (cosine, -((1 - cosine**2) ** 0.5))))
    return np.array(made)


def test_a_list_is_far_when_most_of_its_new_names_are() -> None:
    known = TrainedNames(["cat", "dog"], features_by_word)
    assert known.note(["dog", "CAT"]) is None
    assert known.note(["near", "far", "dog"]) == "2 of 3 class names were not trained (near, far)"
    assert known.note(["near", "far", "far_off", "dog"]) == (
        "3 of 4 class names were not trained (near, far, far_off), and this list is far from the trained one: far, "
        "far_off less similar to any trained name than those are to each other (cosine 0.30, usual 0.80 or more); "
        "compare with zero-shot CLIP; "
        "this CLIP cannot distinguish 'far' and 'far_off': their text features are the same"
    )
    told = "1 of 1 class names were not trained (far)"
    assert TrainedNames(["cat"], features_by_word).note(["far"]) == told
    assert TrainedNames(["cat", "dog"], None).note(["far"]) == told
    many = [f"far {number}" for number in range(499)]
    same = TrainedNames(["cat"], features_by_word).note(["far a", "far b"])
    assert same is not None
    assert same.endswith("; this CLIP cannot distinguish 'far a' and 'far b': their text features are the same")
    assert known.note(many) == "499 of 499 class names were not trained (far 0, far 1, far 2, ...)"


# --- the seam for servers


@pytest.mark.parametrize("name", ["maple", "cocoop", "promptsrc", "linear_probe", "tip_adapter", "clip_adapter"])
def test_images_of_several_lists_in_one_batch(tiny: Backbone, name: str) -> None:
    settings = {"maple": {"prompt_depth": 2}, "promptsrc": {"text_prompt_depth": 2, "vision_prompt_depth": 2}}
    method = build_method({"name": name, **settings.get(name, {})}, tiny, NAMES)
    predictor = TorchPredictor(method, zero_shot=True)
    first, second = predictor.encode_class_names(NAMES[:4]), predictor.encode_class_names([NAMES[5], NAMES[1]])
    seen = predictor.encode_images(np.stack([predictor.preprocess(picture.read()) for picture in colour_pictures()]))
    assert len(seen) == 4
    rows, beside = predictor.probabilities([seen[2], seen[0]], second)
    assert rows.shape == (2, 2)
    assert beside is not None
    assert predictor.probabilities(seen, first)[0].shape == (4, 4)
    assert (predictor.class_names, method.class_names) == (NAMES, NAMES)
    predictor.set_class_names([NAMES[5], NAMES[1]])
    found = answers(predictor, colour_pictures())
    assert [one.probability for one in found[0].best] == pytest.approx(sorted(rows[1], reverse=True), abs=1e-5)
    assert predictor.encode_class_names(NAMES[:4]) is first


def test_methods_of_known_classes_refuse_new_names(tiny: Backbone) -> None:
    predictor = TorchPredictor(build_method({"name": "linear_probe"}, tiny, NAMES))
    with pytest.raises(UnlearnedClassesError, match="'submarine' is not one"):
        predictor.encode_class_names(["submarine", NAMES[0]])


def test_threads_with_lists_of_their_own(prompts: Path) -> None:
    predictor = TorchPredictor.load(prompts, zero_shot=True, device="cpu")
    view = predictor.preprocess(colour_pictures()[0].read())[None]
    lists = [[f"thing {n}", f"car {n}", *(f"x {i}" for i in range(n))] for n in range(20)]

    def ask(names: list[str]) -> list[float]:
        found, _ = predictor.probabilities(predictor.encode_images(view), predictor.encode_class_names(names))
        return found[0].tolist()

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(ask, lists * 2))
    for one, names in zip(found, lists * 2, strict=True):
        assert one == pytest.approx(ask(names), abs=1e-5)


def test_in_order_takes_keys_in_the_callers_thread() -> None:
    here = threading.get_ident()

    def keys() -> "object":
        for number in range(5):
            assert threading.get_ident() == here
            yield number

    assert list(map_in_order(lambda key: 2 * key, keys(), 2, 1)) == [0, 2, 4, 6, 8]  # type: ignore[arg-type]


@pytest.mark.parametrize(("overlap", "begun"), [(True, 9), (False, 3)])
def test_without_overlap_nothing_is_read_before_all_of_a_batch_is_taken(overlap: bool, begun: int) -> None:
    taken: list[int] = []

    def keys() -> Iterator[int]:
        for number in range(10):
            taken.append(number)
            yield number

    with closing(map_in_order(str, keys(), 2, 3, overlap=overlap)) as results:
        assert list(islice(results, 3)) == ["0", "1", "2"]
        assert len(taken) == begun
        assert list(results) == [str(number) for number in range(3, 10)]


@pytest.mark.parametrize(("device", "threads", "reads_on"), [("cpu", 2, False), ("cpu", 1, True), ("cuda", 2, True)])
def test_reading_and_encoding_overlap_where_they_do_not_share_all_cores(
    device: str, threads: int, reads_on: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("maple.data.images.prefetch.usable_cores", lambda: 2)
    assert overlaps(device, threads) == reads_on


@pytest.mark.parametrize(("size", "at_once"), [(64, 100), (112, 41), (224, 32)])
def test_more_small_images_are_computed_at_once(tiny: Backbone, size: int, at_once: int) -> None:
    backbone = copy.copy(tiny)
    backbone.preprocessing = replace(tiny.preprocessing, size=size)
    method = build_method({"name": "zero_shot"}, backbone, ["cat", "dog"])
    assert TorchPredictor(method).batch_size == at_once
