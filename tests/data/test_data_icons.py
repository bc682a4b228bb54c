"""The bundled icons as data sets."""

import subprocess
import sys
from hashlib import sha256

import numpy as np
import pytest

from maple.data import load_dataset, select_dataset
from maple.data.icons import STYLES, archive, draw
from maple.data.icons.styles import Random
from maple.errors import DataError


def test_topics() -> None:
    names = {topic: archive().names(topic) for topic in archive().topics}
    assert set(names) == {"objects", "outdoors", "office", "controls", "devices"}
    every = [name for listed in names.values() for name in listed]
    assert len(every) == len(set(every)) > 300
    assert min(map(len, names.values())) > 45


def test_drawings_of_a_name_differ() -> None:
    topic = "devices"
    for name in archive().names(topic):
        drawings = [
            archive().drawing(topic, name, n).tobytes() for n in range(archive().train_count + archive().test_count)
        ]
        assert len(set(drawings)) == len(drawings), name


@pytest.mark.parametrize("style", STYLES)
def test_styles_draw_something(style: str) -> None:
    drawn = STYLES[style](archive().drawing("objects", "key", 0), Random(1))
    assert drawn.shape == (64, 64, 4)
    assert drawn.min() >= 0
    assert drawn.max() <= 255
    other = STYLES[style](archive().drawing("objects", "scissors", 0), Random(1))
    assert np.abs(drawn - other).max() > 40


def test_dataset() -> None:
    dataset = load_dataset("icons-objects/neon", None)
    assert load_dataset("icons-objects", None).name == "icons-objects/ink"
    count = dataset.num_classes
    assert (len(dataset.train), len(dataset.val), len(dataset.test)) == (16 * count, 4 * count, 6 * count)
    drawings = {split: {item.path.rsplit("/", 1)[1] for item in getattr(dataset, split)} for split in ("train", "test")}
    assert not drawings["train"] & drawings["test"]
    base, novel = select_dataset(dataset, "base"), select_dataset(dataset, "novel")
    assert set(base.class_names) | set(novel.class_names) == set(dataset.class_names)


def test_same_image_in_another_process() -> None:
    paths = [f"{style}/objects/key/{number}" for style in STYLES for number in (0, 20, 101)]
    code = (
        "import sys; from hashlib import sha256; from maple.data.icons import draw;"
        "print(sha256(b''.join(draw(path).tobytes() for path in sys.argv[1:])).hexdigest())"
    )
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == sha256(b"".join(draw(path).tobytes() for path in paths)).hexdigest()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("icons-object", "unknown data set 'icons-object'; choose one of: icons-objects, icons-outdoors"),
        ("icons-objects/oil", "unknown style of icons-objects 'oil'"),
    ],
)
def test_unknown_names(name: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_dataset(name, None)


@pytest.mark.parametrize(
    "path",
    ["neon/objects/key/x", "oil/objects/key/1", "neon/objects/key", "neon/objects/unicorn/1", "ink/objects/key/60"],
)
def test_paths_that_are_not_icons(path: str) -> None:
    with pytest.raises(DataError):
        draw(path)
