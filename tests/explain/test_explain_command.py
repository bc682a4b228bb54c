"""`maple explain`, from the command line to the report."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from maple.cli import app
from maple.errors import MapleError
from maple.explain import Explainer, write_maps
from maple.inference import TorchPredictor, find_images


def explain(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["explain", *map(str, arguments), "--device", "cpu"])


def maps_of(folder: Path) -> list[dict[str, Any]]:
    return list(json.loads((folder / "maps.json").read_text())["maps"])


def test_pictures_and_values(run: Path, pictures: Path) -> None:
    result = explain(run, pictures)
    assert result.exit_code == 1, result.output
    assert "c.png" in result.stderr
    found = maps_of(run / "explanation")
    assert [Path(one["source"]).name for one in found] == ["a.png", "b b.png"]
    assert [one["png"] for one in found] == ["001_a.png", "002_b-b.png"]
    assert "c.png" in json.loads((run / "explanation" / "maps.json").read_text())["left_out"][0]["reason"]
    for one in found:
        for side in ("zero_shot", "trained"):
            values = np.array(one[side]["values"])
            assert values.shape[0] == values.shape[1] > 1
            assert values.sum() == pytest.approx(1, abs=1e-5)
            assert len(one[side]["best"]) == 3
        assert one["class"] == one["trained"]["best"][0]["class"]
        assert one["zero_shot"]["values"] != one["trained"]["values"]
        with Image.open(run / "explanation" / one["png"]) as image:
            assert image.format == "PNG"
            assert image.width > 3 * 256


def test_another_class_and_new_names(run: Path, pictures: Path, tmp_path: Path) -> None:
    picture, output = pictures / "a.png", tmp_path / "out"
    assert (
        explain(run, picture, "--classes", "red cup,blue_cup", "--for", "blue cup", "--output", output).exit_code == 0
    )
    (one,) = maps_of(output)
    assert one["class"] == "blue_cup"
    assert not (run / "explanation").exists()


@pytest.mark.parametrize("target", ["Red_CUP", "cafe\u0301"])
def test_the_class_is_found_by_its_words(run: Path, pictures: Path, tmp_path: Path, target: str) -> None:
    """As the class names of a list are: capital letters, underscores and the form of accents aside."""
    explain(run, pictures / "a.png", "--classes", "red cup,caf\u00e9", "--for", target, "--output", tmp_path / "out")
    (one,) = maps_of(tmp_path / "out")
    assert one["class"] == ("red cup" if "C" in target else "caf\u00e9")


def test_json_is_what_is_written(run: Path, pictures: Path) -> None:
    result = explain(run, pictures / "a.png", "--words", "--json")
    words, picture = (json.loads(line) for line in result.stdout.splitlines())
    assert [picture] == maps_of(run / "explanation")
    assert words == json.loads((run / "explanation" / "words.json").read_text())
    assert len(words["sets"][0]["tokens"]) == 2


def test_words_for_people(run: Path) -> None:
    result = explain(run, "--words", "--top", "2")
    assert result.exit_code == 0
    assert "photo" in result.stdout
    assert "rarely readable" in " ".join(result.stdout.split())


def test_a_second_list_replaces_the_first(run: Path, pictures: Path) -> None:
    explain(run, pictures)
    (run / "explanation" / "mine.png").write_bytes(b"kept")
    explain(run, pictures / "b b.png")
    names = sorted(path.name for path in (run / "explanation").iterdir())
    assert names == ["001_b-b.png", "maps.json", "mine.png"]


def test_what_is_stopped_leaves_the_folder_as_it_was(run: Path, pictures: Path) -> None:
    explain(run, pictures / "a.png")
    before = {path.name: path.read_bytes() for path in (run / "explanation").iterdir()}
    predictor = TorchPredictor.load(run, zero_shot=True, device="cpu")
    writing = write_maps(run / "explanation", Explainer(predictor).explain(find_images([str(pictures / "b b.png")])))
    next(writing)
    writing.close()
    assert {path.name: path.read_bytes() for path in (run / "explanation").iterdir()} == before


def test_nothing_readable_writes_nothing(run: Path, pictures: Path) -> None:
    result = explain(run, pictures / "c.png")
    assert result.exit_code == 2
    assert not (run / "explanation").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "name images, or give --words"),
        (("--words", "--for", "red thing"), "--for and --recursive concern images"),
        (("a.png", "--for", "teapot"), "'teapot' is not one of the classes"),
        (("a.png", "--classes", "cup,,can"), "class name 1"),
        (("a.png", "--output", "FILE"), "cannot be written"),
        (("--words", "--output", "FILE"), "cannot be written"),
    ],
)
def test_wrong_use(arguments: tuple[str, ...], message: str, run: Path, pictures: Path) -> None:
    places = {"a.png": str(pictures / "a.png"), "FILE": str(pictures / "a.png")}
    result = explain(run, *(places.get(argument, argument) for argument in arguments))
    assert isinstance(result.exception, MapleError)
    assert message in str(result.exception)


def test_a_prompts_file_needs_a_place(run: Path, pictures: Path) -> None:
    result = explain(run / "prompts.safetensors", pictures)
    assert "name a folder with --output" in str(result.exception)
    assert explain(run / "prompts.safetensors", "--words").exit_code == 0


def test_a_picture_with_an_odd_name(run: Path, tmp_path: Path) -> None:
    path = tmp_path / ("ü\n" * 30 + ".png")
    Image.new("L", (3, 70), 20).save(path)
    result = explain(run, path)
    assert result.exit_code == 0
    assert maps_of(run / "explanation")[0]["png"] == "001_image.png"
