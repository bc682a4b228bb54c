"""The bundled emoji as data sets."""

import subprocess
import sys
from hashlib import sha256

import pytest

from maple.data import load_dataset, sample_few_shot, select_dataset
from maple.data.emoji import archive, draw
from maple.errors import DataError

STYLES = ("noto", "twemoji", "openmoji", "lineart", "fluent")


def test_groups_and_styles() -> None:
    counts = {group: len(archive().concepts(group)) for group in archive().groups}
    assert set(counts) == {"people", "objects", "flags", "symbols", "places", "animals", "food", "activities"}
    assert min(counts.values()) > 80
    assert tuple(archive().styles) == STYLES


@pytest.mark.parametrize("style", STYLES)
def test_every_concept_is_drawn_in_every_style(style: str) -> None:
    """No glyph is empty: a hole in a sheet would be a class without an image."""
    empty = [concept.code for concept in archive().concepts() if archive().glyph(style, concept.code).getbbox() is None]
    assert empty == []


def test_names_of_a_group_tell_its_concepts_apart() -> None:
    for group in archive().groups:
        names = [concept.name for concept in archive().concepts(group)]
        assert len(set(names)) == len(names), [name for name in names if names.count(name) > 1]


def test_dataset() -> None:
    dataset = load_dataset("emoji-animals", None)
    assert dataset.name == "emoji-animals/twemoji"
    assert load_dataset("emoji-animals/twemoji", None) == dataset
    parts = [{item.path for item in part} for part in (dataset.train, dataset.val, dataset.test)]
    assert not parts[0] & parts[1]
    assert not (parts[0] | parts[1]) & parts[2]
    train, _ = sample_few_shot(dataset.train, dataset.val, 16, 1)
    assert len(train) == 16 * dataset.num_classes
    base, novel = select_dataset(dataset, "base"), select_dataset(dataset, "novel")
    assert set(base.class_names) | set(novel.class_names) == set(dataset.class_names)


def test_same_image_in_another_process() -> None:
    paths = [f"{style}/1f436/{number}" for style in STYLES for number in (0, 205)]
    code = (
        "import sys; from hashlib import sha256; from maple.data.emoji import draw;"
        "print(sha256(b''.join(draw(path).tobytes() for path in sys.argv[1:])).hexdigest())"
    )
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == sha256(b"".join(draw(path).tobytes() for path in paths)).hexdigest()


def test_store_draws_each_image_once() -> None:
    store = load_dataset("emoji-food/lineart", None).store()
    first = store.get("lineart/1f34e/3")
    assert store.get("lineart/1f34e/3") is first
    assert (first.mode, first.size, store.decodes) == ("RGB", (64, 64), 1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("emoji-teapots", "unknown data set 'emoji-teapots'; choose one of: emoji-"),
        ("emoji-food/oil", "unknown style of emoji-food 'oil'; choose one of: noto, twemoji"),
    ],
)
def test_unknown_names(name: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        load_dataset(name, None)
    assert message in str(caught.value)


@pytest.mark.parametrize("path", ["twemoji/1f436", "twemoji/1f436/x", "oil/1f436/1", "twemoji/zzz/1"])
def test_bad_paths(path: str) -> None:
    with pytest.raises(DataError):
        draw(path)
