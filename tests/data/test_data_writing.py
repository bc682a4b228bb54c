"""Items written as files."""

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from maple.cli import app
from maple.data import load_dataset, read_image, write_images
from maple.errors import ConfigError, DataError


def test_every_class_in_turn(tmp_path: Path) -> None:
    dataset = load_dataset("emoji-food", None)
    written = write_images(dataset, tmp_path, count=3)
    assert [path.name for path in written] == ["grapes_1.png", "melon_1.png", "watermelon_1.png"]
    written = write_images(dataset, tmp_path, count=dataset.num_classes + 1)
    assert written[-1].name == "grapes_2.png"
    assert len(set(written)) == dataset.num_classes + 1


def test_written_images_are_the_items(tmp_path: Path) -> None:
    dataset = load_dataset("emoji-food/lineart", None)
    written = write_images(dataset, tmp_path, count=99, part="val", class_name="red apple")
    assert [path.name for path in written] == [f"red_apple_{number}.png" for number in (1, 2, 3, 4)]
    items = [item for item in dataset.val if item.class_name == "red apple"]
    for path, item in zip(written, items, strict=True):
        assert read_image(path).tobytes() == dataset.store().get(item.path).tobytes()


def test_a_folder_of_files(tmp_path: Path, make_images: Callable[..., Path]) -> None:
    dataset = load_dataset(str(make_images(classes=("a/b?".replace("/", "."), "c d", "c_d"))), None)
    written = write_images(dataset, tmp_path / "out", count=6)
    assert [path.name for path in written] == [
        *("a_b_1.png", "c_d_1.png", "c_d_2.png", "a_b_2.png", "c_d_3.png", "c_d_4.png")
    ]
    assert len(list((tmp_path / "out").iterdir())) == 6


def test_again_is_fine_but_nothing_is_overwritten(tmp_path: Path) -> None:
    dataset = load_dataset("emoji-food", None)
    (path,) = write_images(dataset, tmp_path, count=1)
    before = path.stat().st_mtime_ns
    assert write_images(dataset, tmp_path, count=1) == [path]
    assert path.stat().st_mtime_ns == before
    Image.new("RGB", (4, 4)).save(path)
    content = path.read_bytes()
    with pytest.raises(DataError, match=r"grapes_1.png exists with other content; choose another folder"):
        write_images(dataset, tmp_path, count=1)
    assert path.read_bytes() == content


def test_errors(tmp_path: Path, make_images: Callable[..., Path]) -> None:
    dataset = load_dataset(str(make_images()), None)
    with pytest.raises(ConfigError, match="count is 0"):
        write_images(dataset, tmp_path, count=0)
    with pytest.raises(ConfigError, match="unknown part 'dev'; choose one of: train, val, test"):
        write_images(dataset, tmp_path, part="dev")
    with pytest.raises(DataError, match="unknown class of pictures 'cow'; choose one of: bird, cat, dog, eel"):
        write_images(dataset, tmp_path, class_name="cow")
    with pytest.raises(DataError, match=r"val split of pictures has no such items \(it has train 16, val 0, test 12\)"):
        write_images(dataset, tmp_path, part="val")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file/bird_1.png cannot be written \(.*\); choose another folder"):
        write_images(dataset, tmp_path / "file")


def test_the_command(tmp_path: Path) -> None:
    arguments = ["data", "draw", "emoji-food/noto", "--output", str(tmp_path / "out"), "--class", "red apple"]
    done = CliRunner().invoke(app, [*arguments, "--count", "2"], catch_exceptions=False)
    assert done.exit_code == 0
    assert done.output.splitlines() == [str(tmp_path / "out" / f"red_apple_{number}.png") for number in (1, 2)]
    assert read_image(tmp_path / "out" / "red_apple_1.png").size == (64, 64)
