"""Predictions on a real Ray cluster of this machine: the answers of one process, whatever is killed."""

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from inference_helpers import COLOURS, png

from maple.errors import BackboneError, BusyError, ConfigError
from maple.inference import BulkResult, find_images, load_predictor, predict_on_ray, ray_predict
from maple.inference.prediction_tables import to_row
from maple.inference.sources import bulk_sources

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'maple-clip[ray]'")
pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install 'maple-clip[ray]'")
pq = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed: pip install 'maple-clip[ray]'")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of Ray Data, about its own settings
    # Ray leaves pipes and sockets of the cluster's processes to the garbage collector.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

NUMBERS: dict[str, Any] = {"top": 3, "reject": 0.2}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """48 images of noisy colours, and a broken one."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(48):
        red, green, blue = list(COLOURS.values())[number % 4]
        (folder / f"{number:02}.png").write_bytes(png((red, green, (blue + 5 * number) % 256)))
    (folder / "broken.png").write_bytes(png()[:50])
    return folder


def rows_of(output: Path) -> dict[str, dict[str, Any]]:
    rows = pq.read_table(output).to_pylist()
    assert len({row["source"] for row in rows}) == len(rows), "an image was answered twice"
    return {row["source"]: row for row in rows}


def expected_rows(prompts: Path, photos: Path) -> list[dict[str, Any]]:
    predictor = load_predictor(prompts, device="cpu")
    return [to_row(result) for result in predictor.stream(find_images([str(photos)]), **NUMBERS)]


@pytest.mark.usefixtures("ray_cluster")
def test_with_a_worker_killed_the_rows_of_one_process(
    prompts: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pids, output = tmp_path / "pids", tmp_path / "out.parquet"
    pids.mkdir()
    monkeypatch.setattr(bulk_sources, "FILES_PER_UNIT", 4)
    killed: list[int] = []

    class Noting(ray_predict._Classifier):
        """Records its process; it is local, so that Ray pickles it by value."""

        def __call__(self, batch: Any) -> Any:
            (pids / str(os.getpid())).touch()
            time.sleep(0.2)
            return super().__call__(batch)

    def kill(_: int) -> None:
        if not killed:
            killed.append(int(next(pids.iterdir()).name))
            os.kill(killed[0], signal.SIGKILL)

    monkeypatch.setattr(ray_predict, "_Classifier", Noting)
    done = predict_on_ray(prompts, [str(photos)], output, **NUMBERS, batch_size=2, actors=2, on_images=kill)
    assert done == BulkResult(images=49, unreadable=1, new=49)
    assert len(list(pids.iterdir())) > 1, "another process took over"
    rows = rows_of(output)
    expected = expected_rows(prompts, photos)
    assert sorted(rows) == [row["path"] for row in expected]
    for row in expected:
        answer = rows[row["path"]]
        assert (answer["classes"], answer["rejected"]) == (row["classes"], row["rejected"])
        assert answer["error"] == row["error"]
        if row["error"] is None:
            assert answer["probabilities"] == pytest.approx(row["probabilities"], abs=1e-5)


def test_an_interrupted_call_is_continued(
    prompts: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a cluster: the classifier of the actors reads in this process."""
    classified: list[str] = []

    def stream(units: Any, answered: Any, actor: dict[str, Any], _: Any) -> Iterator[Any]:
        classify = ray_predict._Classifier(**actor)
        for index in range(len(units)):
            monkeypatch.setattr(ray, "get", lambda values: values)
            for table in ray_predict._read_units(pa.table({"unit": [index]}), units, answered):
                classified.extend(table["source"].to_pylist())
                yield classify(table)

    def interrupt(images: int) -> None:
        if images >= 20:
            raise KeyboardInterrupt

    monkeypatch.setattr(bulk_sources, "FILES_PER_UNIT", 4)
    monkeypatch.setattr(ray_predict, "_stream", stream)
    monkeypatch.setattr(ray_predict, "connection", lambda _: nullcontext())
    monkeypatch.setattr(ray_predict, "reserved_gpus", lambda *_, **__: 0)
    output = tmp_path / "out.parquet"
    with pytest.raises(KeyboardInterrupt):
        predict_on_ray(prompts, [str(photos)], output, **NUMBERS, on_images=interrupt)
    begun = rows_of(output)
    assert len(begun) == 20
    done = predict_on_ray(prompts, [str(photos)], output, **NUMBERS)
    assert done == BulkResult(images=49, unreadable=1, new=29)
    assert len(classified) == len(set(classified)) == 49, "no image is classified twice"
    rows = rows_of(output)
    assert all(rows[source] == row for source, row in begun.items())
    assert sorted(rows) == [row["path"] for row in expected_rows(prompts, photos)]
    assert predict_on_ray(prompts, [str(photos)], output, **NUMBERS).new == 0, "finished"
    with pytest.raises(ConfigError, match=r"was begun with top=3, and this command has top=2"):
        predict_on_ray(prompts, [str(photos)], output, **{**NUMBERS, "top": 2})
    with pytest.raises(ConfigError, match=r"was begun with other class names; choose another output"):
        predict_on_ray(prompts, [str(photos)], output, **NUMBERS, classes=["cat", "dog"])


@pytest.mark.usefixtures("ray_cluster")
def test_an_error_of_a_worker_is_one_of_the_command(
    prompts: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(ray_predict._Classifier):
        def __init__(self, **_: Any) -> None:
            raise ConfigError("its CLIP is not on this machine")

    monkeypatch.setattr(ray_predict, "_Classifier", Failing)
    with pytest.raises(BackboneError, match=r"its CLIP is not on this machine.*repeat the command to continue"):
        predict_on_ray(prompts, [str(photos)], tmp_path / "out.parquet")


def test_refused_before_a_cluster_is_started(prompts: Path, photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.parquet"
    with pytest.raises(ConfigError, match="actors is 0"):
        predict_on_ray(prompts, [str(photos)], output, actors=0)
    with pytest.raises(ConfigError, match="nosuch: there is no such file"):
        predict_on_ray(prompts, ["nosuch"], output)
    with pytest.raises(ConfigError, match=r"was begun with sources=.*nosuch.*choose another output"):
        predict_on_ray(prompts, [str(photos)], output)
    folder = ray_predict._OutputFolder(output, json.loads((output / "_maple.json").read_text())["settings"])
    with (
        folder.opened(),
        pytest.raises(BusyError, match="another process writes to"),
        ray_predict._OutputFolder(output, {}).opened(),
    ):
        pass
    other = tmp_path / "other.parquet"
    other.write_text("a file")
    with pytest.raises(ConfigError, match="exists, and is not a folder that this command has begun"):
        predict_on_ray(prompts, [str(photos)], other)
