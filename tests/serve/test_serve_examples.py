"""The images that the server's page offers: test images of the run, and none of a folder that only a file names."""

import json
import threading
from pathlib import Path

import pytest
from PIL import Image
from serve_helpers import Colours
from starlette.testclient import TestClient

from maple.data import load_dataset
from maple.data.saved_split import SAVED_SPLIT, write_saved_split
from maple.serve.api import create_app
from maple.serve.examples import find_examples, trained_dataset
from maple.serve.limits import Limits
from maple.serve.middleware import LOOPBACK
from maple.serve.responses import ExampleList


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for label, name in enumerate(("cat", "dog")):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for number in range(8):
            Image.new("RGB", (20, 20), (100 * label, 20 * number, 9)).save(tmp_path / "pets" / name / f"{number}.png")
    return tmp_path / "pets"


def test_examples_are_the_test_images_of_the_run(images: Path, tmp_path: Path) -> None:
    divided = load_dataset(str(images), None, seed=7, class_names={"cat": "small cat"})
    assert divided.test != load_dataset(str(images), None, class_names={"cat": "small cat"}).test
    run = tmp_path / "run"
    write_saved_split(run / SAVED_SPLIT, divided, str(images))
    (run / "config.json").write_text(json.dumps({"data": {"dataset": str(images), "class_names": {"cat": "no"}}}))
    dataset = trained_dataset(run, {"dataset": str(images)}, None)
    assert dataset is not None
    assert dataset.test == divided.test
    found = find_examples(dataset, ["dog"])
    assert (found.source, [each.class_name for each in found.examples]) == ("pets", ["dog", "small cat"])


@pytest.mark.parametrize("run", ["prompts.safetensors", "exported", "hub:owner/name"])
def test_a_folder_that_only_prompts_name_is_not_opened(run: str, images: Path, tmp_path: Path) -> None:
    assert trained_dataset(tmp_path / run, {"dataset": str(images)}, None) is None
    bundled = trained_dataset(tmp_path / run, {"dataset": "emoji-food/twemoji"}, None)
    assert bundled is not None
    assert bundled.name == "emoji-food/twemoji"


@pytest.mark.parametrize("data", [[1], None, {"root": 3, "class_names": 7}, {"unknown": 1}])
def test_damaged_settings_of_a_run_are_left_aside(data: object, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"data": data}))
    dataset = trained_dataset(tmp_path, {"dataset": "emoji-food/twemoji"}, None)
    assert dataset is not None
    assert dataset.class_names[0] == "grapes"


def test_the_end_of_a_server_does_not_wait_for_the_examples() -> None:
    started, release = threading.Event(), threading.Event()
    finished = []

    def find() -> ExampleList:
        started.set()
        release.wait(60)
        finished.append(True)
        return ExampleList(source=None, examples=[])

    app = create_app(Colours(), Limits(), token=None, hosts=LOOPBACK, find_examples=find)
    with TestClient(app, base_url="http://127.0.0.1"):
        assert started.wait(60)
    assert not finished
    release.set()
