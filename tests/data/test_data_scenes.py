"""The bundled emoji, and scenes that are the same bytes everywhere."""

import hashlib
import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from maple.data.emoji.archive import EmojiArchive, scene_seed
from maple.data.scenes import render_scene
from maple.errors import ConfigError, DataError

GROUPS = {"animals", "food", "objects", "places", "people", "symbols", "activities", "flags"}
STYLES = {"noto", "twemoji", "openmoji", "lineart", "fluent"}
# style, code, index, difficulty, size: SHA-256 of the pixels, from the machine that drew them first
KNOWN = {
    ("noto", "1f436", 0, 0.0, 64): "54c85af2b400f066f3c655accf35cea7c3cee31aa894588090df18b47e4c1768",
    ("twemoji", "1f34e", 1, 0.5, 64): "359d5b9d202e903402e4722582dd6b1c1b0252dfa137ecfadfb3dc6bca8131ca",
    ("openmoji", "1f1eb-1f1f7", 2, 1.0, 64): "df80b4c145a72cb7516cd09b9943bae34e74cb67584027c261e6ccbd045852f0",
    ("lineart", "1f697", 3, 1.0, 48): "5ecc97ad38d38580a9f70e297fd35954cf27954c174e392fdbfca7b6308ba9e8",
    ("fluent", "1f600", 4, 0.75, 224): "cefa2f02863ce5ea413bd2581ddbf03fec070cbebacdca109a03de99920482e8",
}
DRAW = """
import hashlib, json, sys
from maple.data.emoji.archive import EmojiArchive, scene_seed
from maple.data.scenes import render_scene
archive = EmojiArchive()
for style, code, index, difficulty, size in json.load(sys.stdin):
    glyph = archive.glyph(style, code)
    scene = render_scene(glyph, scene_seed(style, code, index), difficulty=difficulty, size=size)
    print(hashlib.sha256(scene.tobytes()).hexdigest())
"""


@pytest.fixture(scope="module")
def archive() -> EmojiArchive:
    return EmojiArchive()


def test_archive_lists_every_concept_once_under_a_plain_name(archive: EmojiArchive) -> None:
    concepts = archive.concepts()
    assert set(archive.groups) == GROUPS
    assert len(concepts) > 1600
    assert len({concept.code for concept in concepts}) == len({concept.name for concept in concepts}) == len(concepts)
    assert all(concept.name and concept.name == concept.name.lower().strip() for concept in concepts)
    assert all(concept.name.isascii() for concept in concepts)
    assert sum(len(archive.concepts(group)) for group in archive.groups) == len(concepts)
    assert [concept.name for concept in archive.concepts("animals")][:2] == ["monkey face", "monkey"]


def test_archive_names_the_licence_of_every_style(archive: EmojiArchive) -> None:
    assert {style: record["licence"] for style, record in archive.licences.items()} == {
        "noto": "Apache-2.0",
        "twemoji": "CC-BY-4.0",
        "openmoji": "CC-BY-SA-4.0",
        "lineart": "CC-BY-SA-4.0",
        "fluent": "MIT",
    }


def test_every_glyph_of_a_group_is_drawn_in_every_style(archive: EmojiArchive) -> None:
    assert set(archive.styles) == STYLES
    for style in archive.styles:
        for concept in archive.concepts("food"):
            glyph = archive.glyph(style, concept.code)
            opaque = np.asarray(glyph)[..., 3] > 128
            assert (glyph.mode, glyph.size) == ("RGBA", (64, 64))
            assert opaque.mean() > 0.02, f"{style} {concept.name}"


def test_styles_are_different_drawings_of_one_concept(archive: EmojiArchive) -> None:
    assert len({archive.glyph(style, "1f436").tobytes() for style in archive.styles}) == len(STYLES)


@pytest.mark.parametrize(("style", "code"), [("apple", "1f436"), ("noto", "dog")])
def test_unknown_style_or_code_is_a_data_error(archive: EmojiArchive, style: str, code: str) -> None:
    with pytest.raises(DataError, match="unknown emoji"):
        archive.glyph(style, code)


def test_unknown_group_is_a_data_error_that_lists_the_groups(archive: EmojiArchive) -> None:
    with pytest.raises(DataError, match="animals"):
        archive.concepts("plants")


def test_scenes_have_the_bytes_they_always_had(archive: EmojiArchive) -> None:
    drawn = {}
    for style, code, index, difficulty, size in KNOWN:
        seed = scene_seed(style, code, index)
        scene = render_scene(archive.glyph(style, code), seed, difficulty=difficulty, size=size)
        assert (scene.mode, scene.size) == ("RGB", (size, size))
        drawn[style, code, index, difficulty, size] = hashlib.sha256(scene.tobytes()).hexdigest()
    assert drawn == KNOWN


def test_scenes_have_the_same_bytes_in_another_process() -> None:
    command = [sys.executable, "-c", DRAW]
    output = subprocess.run(command, input=json.dumps(list(KNOWN)), capture_output=True, text=True, check=True).stdout
    assert output.split() == list(KNOWN.values())


def test_archive_travels_to_a_worker_process(archive: EmojiArchive) -> None:
    archive.glyph("noto", "1f436")
    copy = pickle.loads(pickle.dumps(archive))
    assert copy.glyph("noto", "1f436").tobytes() == archive.glyph("noto", "1f436").tobytes()
    assert len(pickle.dumps(archive)) < 1000


def test_scenes_of_other_seeds_differ(archive: EmojiArchive) -> None:
    glyph = archive.glyph("noto", "1f436")
    seeds = [scene_seed("noto", "1f436", index) for index in range(20)]
    assert len({render_scene(glyph, seed, difficulty=0.5).tobytes() for seed in seeds}) == 20


def test_easy_scene_is_the_large_upright_drawing_on_a_light_plain_ground() -> None:
    square = Image.new("RGBA", (64, 64), (200, 0, 0, 255))
    pixels = np.asarray(render_scene(square, 3, difficulty=0)).astype(int)
    red = (pixels[..., 0] > pixels[..., 1] + 80) & (pixels[..., 0] > pixels[..., 2] + 80)
    assert 0.84**2 - 0.05 < red.mean() < 0.94**2 + 0.05
    corners = pixels[[0, 0, -1, -1], [0, -1, 0, -1]]
    assert corners.min() > 150
    assert np.ptp(corners, axis=0).max() < 25


def test_harder_scenes_vary_more_in_size() -> None:
    square = Image.new("RGBA", (64, 64), (0, 0, 0, 255))
    covered = {
        difficulty: [
            (np.asarray(render_scene(square, seed, difficulty=difficulty)).max(axis=2) < 40).mean()
            for seed in range(40)
        ]
        for difficulty in (0.0, 1.0)
    }
    assert np.std(covered[1.0]) > 3 * np.std(covered[0.0])


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(min_value=-(2**70), max_value=2**70),
    difficulty=st.floats(min_value=0, max_value=1),
    size=st.integers(min_value=1, max_value=80),
)
def test_any_seed_difficulty_and_size_render_an_image(seed: int, difficulty: float, size: int) -> None:
    glyph = EmojiArchive().glyph("openmoji", "1f34e")
    scene = render_scene(glyph, seed, difficulty=difficulty, size=size)
    assert (scene.mode, scene.size) == ("RGB", (size, size))
    assert scene.tobytes() == render_scene(glyph, seed, difficulty=difficulty, size=size).tobytes()


@pytest.mark.parametrize(("difficulty", "size"), [(-0.1, 64), (1.1, 64), (float("nan"), 64), (0.5, 0), (0.5, 4097)])
def test_settings_out_of_range_are_config_errors(difficulty: float, size: int) -> None:
    with pytest.raises(ConfigError, match="it must be within"):
        render_scene(Image.new("RGBA", (64, 64)), 0, difficulty=difficulty, size=size)


@pytest.mark.parametrize("glyph", [Image.new("RGB", (64, 64)), Image.new("RGBA", (64, 32))])
def test_glyph_of_another_form_is_a_data_error(glyph: Image.Image) -> None:
    with pytest.raises(DataError, match="must be RGBA and square"):
        render_scene(glyph, 0, difficulty=0.5)
