"""Files written by the first edition still load, and answer the same."""

import csv
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from maple import load_clip, load_prompts
from maple.cli import app
from maple.errors import UntrustedBackboneError
from maple.inference import ImageSource, Prediction, load_predictor
from maple.runs import read_rows, read_settings, train_run

ARCHIVE = Path(__file__).with_name("first_edition.tar.xz")
TRAINED, OTHER = ["tabby cat", "dog", "red_fox"], ["red car", "blue car", "dog"]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The unpacked files, as the working directory: their backbone is called `clip`."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    merges = Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
    shutil.copy(merges, tmp_path / "maple-onnx")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def sources(folder: Path) -> list[ImageSource]:
    return [
        ImageSource(str(path.relative_to(folder)), lambda path=path: Image.open(path).convert("RGB"))  # type: ignore[misc]
        for path in sorted((folder / "images").iterdir())
    ]


@pytest.mark.parametrize(
    ("file", "key", "names"),
    [
        ("maple.safetensors", "maple.safetensors", TRAINED),
        ("maple.safetensors", "maple.safetensors:new", OTHER),
        ("coop.safetensors", "coop.safetensors", TRAINED),
        ("coop.safetensors", "coop.safetensors:new", OTHER),
        ("tip_adapter.safetensors", "tip_adapter.safetensors", TRAINED),
        ("maple-onnx", "maple-onnx:new", OTHER),
    ],
)
def test_prompts_files_and_exports_answer_the_same(files: Path, file: str, key: str, names: list[str]) -> None:
    expected = json.loads((files / "answers.json").read_text())[key]
    if file.endswith(".safetensors"):  # its CLIP is a path, which a file alone may not name
        with pytest.raises(UntrustedBackboneError, match="relative to the folder of the training"):
            load_predictor(file, device="cpu")
        load_clip("clip")
    predictor = load_predictor(file, zero_shot=True, device="cpu")
    predictor.set_class_names(names)
    predictions = list(predictor.stream(sources(files)))
    assert len(predictions) == len(expected) == 3
    for prediction, wanted in zip(predictions, expected, strict=True):
        assert isinstance(prediction, Prediction)
        for best, recorded in ((prediction.best, wanted["best"]), (prediction.zero_shot, wanted["zero_shot"])):
            assert best is not None
            assert {ranked.name for ranked in best} == {name for name, _ in recorded}
            probabilities = {ranked.name: ranked.probability for ranked in best}
            assert probabilities == pytest.approx(dict(recorded), abs=2e-5)


@pytest.mark.usefixtures("files")
@pytest.mark.filterwarnings("ignore:.*torch.jit.load:FutureWarning")
def test_plain_clips_load_and_torchscript_computes_the_same() -> None:
    backbone = load_clip("clip", device="cpu")
    method = load_prompts("coop.safetensors", backbone)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for folder in ("export-openclip", "export-transformers"):
        exported = load_clip(folder, device="cpu")
        torch.testing.assert_close(exported.image.plain(images), backbone.image.plain(images), rtol=1e-4, atol=1e-5)
    scripted = torch.jit.load("export-torchscript/model.pt")
    method = load_prompts("maple.safetensors", backbone)
    torch.testing.assert_close(scripted(images), method(images), rtol=1e-4, atol=1e-4)


def test_a_finished_run_is_read_and_not_repeated(files: Path) -> None:
    run = files / "run"
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    settings = read_settings(run)
    result = train_run(settings, run, device="cpu")
    assert [report.epoch for report in result.history] == [0, 1]
    rows: list[dict[str, Any]] = read_rows(run)
    assert len(rows) == 2
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.name in before} == before


def test_the_report_of_its_rows_is_the_same(files: Path) -> None:
    result = CliRunner().invoke(app, ["report", "run", "--format", "csv"])
    assert result.exit_code == 0, result.output
    with (files / "report.csv").open() as old, (files / "run" / "report.csv").open() as new:
        assert list(csv.reader(new)) == list(csv.reader(old))


def test_an_interrupted_run_continues_to_the_same_result(files: Path) -> None:
    run = files / "interrupted"
    train_run(read_settings(run), run, device="cpu")
    expected, tensors = load_file(files / "finished.safetensors"), load_file(run / "prompts.safetensors")
    assert expected.keys() == tensors.keys()
    for name, value in expected.items():
        torch.testing.assert_close(tensors[name], value, rtol=1e-4, atol=1e-5)
    losses = [
        [json.loads(line)["loss"] for line in (path).read_text().splitlines()]
        for path in (files / "finished.jsonl", run / "metrics.jsonl")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
