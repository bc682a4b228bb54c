"""`maple data list | show | prepare | verify`."""

import io
import json
import re
import sys
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from maple.cli import app, main
from maple.data.checks.verify import Statistics, published_statistics
from maple.errors import DownloadError, MapleError


def data(*arguments: object) -> Result:
    environment = {"COLUMNS": "200", "MAPLE_DATA": None}
    return CliRunner().invoke(app, ["data", *map(str, arguments)], catch_exceptions=False, env=environment)


@pytest.fixture
def ucf101(tmp_path: Path) -> Path:
    """A data root with two classes of UCF101."""
    folder = tmp_path / "root/ucf101"
    rows = []
    for label, name in enumerate(("Apply_Eye_Makeup", "Archery")):
        path = folder / "UCF-101-midframes" / name / "v_1.jpg"
        path.parent.mkdir(parents=True)
        Image.new("RGB", (20, 20), (90 * label, 10, 10)).save(path)
        rows.append([f"{name}/v_1.jpg", label, name])
    (folder / "split_zhou_UCF101.json").write_text(json.dumps({"train": rows, "val": [], "test": rows[:1]}))
    return tmp_path / "root"


@pytest.fixture
def mirror(ucf101: Path) -> Iterator[str]:
    """The address of a server with what UCF101 is published as."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for path in (ucf101 / "ucf101/UCF-101-midframes").rglob("*.jpg"):
            archive.write(path, path.relative_to(ucf101 / "ucf101"))
    files = {
        "/ucf/UCF-101-midframes.zip": content.getvalue(),
        "/ucf/split_zhou_UCF101.json": (ucf101 / "ucf101/split_zhou_UCF101.json").read_bytes(),
    }

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = files.get(self.path)
            self.send_response(200 if body else 404)
            self.send_header("Content-Length", str(len(body or b"")))
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, *_arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/ucf/"
    server.shutdown()
    thread.join()
    server.server_close()


def test_list_contains_all_data_sets_and_their_state(ucf101: Path) -> None:
    (ucf101 / "dtd/images/banded").mkdir(parents=True)
    output = data("list", "--data-root", ucf101).stdout
    table = [[cell.strip() for cell in line.split("│")[1:]] for line in output.splitlines() if "│" in line]
    rows = {cells[0]: cells for cells in table}
    assert len(rows) == 15 + 8 + 5
    assert rows["imagenet"][:6] == ["imagenet", "published", "1,000", "1,281,167", "0", "50,000"]
    assert rows["imagenet_a"][1:3] == ["evaluation", "200"]
    assert rows["emoji-food"][1] == "bundled"
    assert rows["ucf101"][6:8] == ["a photo of a person doing {}.", "differs"], "as prepare and verify say"
    assert rows["dtd"][7] == "lacks dtd/split_zhou_DescribableTextures.json"
    assert rows["eurosat"][7] == "no"
    assert "neither --data-root nor MAPLE_DATA" in data("list").stdout


def test_the_list_fits_into_a_small_terminal() -> None:
    """The templates, which would be two letters wide there, are left out; a pipe gets complete lines."""
    small = {"COLUMNS": "80", "MAPLE_DATA": None}
    piped = CliRunner().invoke(app, ["data", "list"], env=small).stdout
    assert "│ a photo of a person doing {}. " in piped
    shown = CliRunner().invoke(app, ["data", "list"], env={**small, "FORCE_COLOR": "1"}).stdout
    plain = re.sub(r"\x1b\[[0-9;]*m", "", shown)
    assert "too narrow for the templates" in plain
    row = next(line for line in plain.splitlines() if "ucf101" in line)
    assert [cell.strip() for cell in row.split("│")[1:-1]] == ["ucf101", "published", "101", "7,639", "?", "3,783", "?"]


def test_show(ucf101: Path) -> None:
    output = data("show", "ucf101", "--data-root", ucf101).stdout
    assert "2 classes in" in output
    assert "images: train 2, val 0, test 1\n" in output
    assert "zero-shot template: a photo of a person doing {}." in output
    assert "Apply_Eye_Makeup/v_1.jpg" in output
    folder = data("show", ucf101 / "ucf101/UCF-101-midframes").stdout
    assert "split at random" in folder
    assert "template: none of its own" in folder


def test_prepare_from_a_mirror_and_compare(ucf101: Path, mirror: str, tmp_path: Path) -> None:
    new = tmp_path / "new"
    result = data("prepare", "ucf101", "--data-root", new, "--mirror", mirror)
    assert result.exit_code == 1, "two classes are not the published data set"
    assert "ucf101: ready (train 2, val 0, test 1, classes 2)\nnext: maple data verify ucf101\n" in result.stdout
    assert "classes: 2 found, 101 published" in result.stderr
    for path in (ucf101 / "ucf101").rglob("*.*"):
        assert (new / path.relative_to(ucf101)).read_bytes() == path.read_bytes()
    assert not list((new / "downloads").glob("*/*"))
    (new / "ucf101/UCF-101-midframes/Archery/v_1.jpg").unlink()
    again = data("prepare", "ucf101", "--data-root", new, "--mirror", "http://127.0.0.1:9")
    assert again.exit_code == 1
    assert again.stdout.startswith("ucf101: differs from the published data set (train 2, val 0, test 1, classes 2); ")
    assert "move ucf101/ away and run `maple data prepare ucf101`" in again.stdout
    assert "images: 1 of 3 are missing in " in again.stderr
    assert "(the first is Archery/v_1.jpg)" in again.stderr


def test_a_complete_data_set_is_present(ucf101: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = {"train": 2, "val": 0, "test": 1, "test_base": 1, "test_new": 0, "classes": 2}
    monkeypatch.setitem(published_statistics(), "ucf101", Statistics(dict(counts), None, "a test"))
    result = data("prepare", "ucf101", "--data-root", ucf101)
    assert result.exit_code == 0
    assert "was present already" in result.stdout
    assert data("verify", "ucf101", "--data-root", ucf101).exit_code == 0


def test_prepare_explains_what_to_do_by_hand(mirror: str, tmp_path: Path) -> None:
    message = r"(?s)is not complete.*By hand .*as .*downloads/fgvc_aircraft/fgvc-aircraft"
    with pytest.raises(DownloadError, match=message):
        data("prepare", "fgvc_aircraft", "--data-root", tmp_path, "--mirror", mirror)
    with pytest.raises(MapleError, match="set --data-root, or MAPLE_DATA"):
        data("prepare", "dtd")


def test_an_error_is_one_line_without_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["maple", "data", "verify", "dtd", "--data-root", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"maple: {tmp_path}/dtd: the folder of DTD is missing;")
    assert "`maple data prepare dtd` says how to get it" in error


def test_verify_lists_every_problem_and_fails(ucf101: Path) -> None:
    result = data("verify", "ucf101", "--data-root", ucf101)
    assert result.exit_code == 1
    assert "train: 2 found, 7639 published" in result.stdout
    image = ucf101 / "ucf101/UCF-101-midframes/Archery/v_1.jpg"
    image.write_bytes(image.read_bytes()[:400])
    broken = data("verify", "ucf101", "--data-root", ucf101).stdout
    assert f"{image}: " in broken
    assert str(image) not in data("verify", "ucf101", "--data-root", ucf101, "--quick").stdout
    image.unlink()
    quick = data("verify", "ucf101", "--data-root", ucf101, "--quick").stdout
    assert f"{image}: there is no such file\n" in quick
    assert "3 images checked for existence, " in quick


def test_verify_own_images(ucf101: Path) -> None:
    result = data("verify", ucf101 / "ucf101/UCF-101-midframes")
    assert result.exit_code == 0
    assert result.stdout == "UCF-101-midframes: 2 images decoded, no problems; no published numbers to compare with\n"
