"""`maple serve` as a user types it, with a real method."""

import json
import signal
import socket
import time
import urllib.request
from pathlib import Path

import pytest
from forked import start_maple
from serve_helpers import png
from typer.testing import CliRunner

from maple import build_method, load_clip, save_prompts
from maple.cli import app
from maple.errors import CheckpointError, ConfigError, MapleError
from maple.inference import ImageSource, TorchPredictor

NAMES = ("red thing", "green_thing", "blue thing", "red thing")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MaPLe as it starts; two of its classes have one name, as in published data sets."""
    path = tmp_path_factory.mktemp("serve") / "prompts.safetensors"
    method = build_method({"name": "maple", "prompt_depth": 2}, load_clip("maple-tiny", "random:1"), NAMES)
    save_prompts(path, method, {"dataset": "emoji-food/lineart"})
    return path


def serve(*arguments: object) -> None:
    result = CliRunner().invoke(app, ["serve", *map(str, arguments)], catch_exceptions=False)
    raise AssertionError(f"it served: {result.output}")


def test_errors_come_before_the_model_is_loaded(prompts: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} of 127.0.0.1 is in use"):
            serve(prompts, "--port", port)
    wrong: list[tuple[list[object], str]] = [
        (["--host", "0.0.0.0"], "--no-token"),
        (["--token", "short"], "at least 16"),
        (["--port", "99999"], "port 99999 is not valid"),
        (["--max-upload", "nan"], "--max-upload"),
        (["--max-images", "0"], "images is 0"),
        (["--max-images", "200"], "raise queue"),
        (["--allow-host", "http://x"], "--allow-host"),
        (["--url-prefix", "maple"], "the URL prefix 'maple' is not a path"),
        (["--url-prefix", "/maple/../x"], "is not a path"),
        (["--url-prefix", "/v1"], "begins with 'v1', a path of the server"),
        (["--device", "cpux"], "cpux"),
    ]
    for options, message in wrong:
        with pytest.raises(MapleError, match=message):
            serve(prompts, *([] if "--port" in options else ["--port", 0]), *options)
    with pytest.raises(CheckpointError, match="is not a run folder"):
        serve(tmp_path, "--port", 0)


@pytest.mark.slow
def test_it_predicts_as_predict_does_and_stops_at_a_signal(prompts: Path, tmp_path: Path) -> None:
    environment = {"MAPLE_TOKEN": "a-token-of-the-test"}
    server = start_maple("serve", prompts, "--port", 0, "--device", "cpu", environment=environment)
    limit = time.monotonic() + 100
    try:
        while server.stdout.count("\n") < 2 and server.returncode is None and time.monotonic() < limit:
            time.sleep(0.02)
        first, second = server.stdout.splitlines()
        assert first == "maple: MaPLe on maple-tiny, trained on emoji-food/lineart"
        url = second.split()[3]
        answers = [ask(url, None), ask(url, ["red car", "teapot"])]
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0
    finally:
        server.send_signal(signal.SIGKILL)
    assert server.stdout.splitlines() == [first, second, "maple: stopped"]
    assert server.stderr == ""
    (tmp_path / "x.png").write_bytes(png((30, 180, 30)))
    predictor = TorchPredictor.load(prompts, zero_shot=True, device="cpu")
    for names, found in zip((None, ["red car", "teapot"]), answers, strict=True):
        if names is not None:
            predictor.set_class_names(names)
        from maple.data import read_image

        picture = ImageSource("x", lambda: read_image(tmp_path / "x.png"))
        (right,) = predictor.stream([picture])
        (one,) = found["predictions"]
        for which in ("best", "zero_shot"):
            expected = [(rank.name, pytest.approx(rank.probability, abs=1e-5)) for rank in getattr(right, which)]
            assert [(rank["class"], rank["probability"]) for rank in one[which]] == expected


def ask(url: str, names: list[str] | None) -> dict:  # type: ignore[type-arg]
    import base64

    body = {"images": [base64.b64encode(png((30, 180, 30))).decode()], "class_names": names, "zero_shot": True}
    headers = {"Content-Type": "application/json", "Authorization": "Bearer a-token-of-the-test"}
    request = urllib.request.Request(f"{url}/v1/predict", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=30) as answer:
        return dict(json.load(answer))
