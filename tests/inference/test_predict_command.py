"""`maple predict` as a user types it."""

import csv
import io
import json
import os
import sys
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, cast

import pytest
from click.testing import Result
from forked import ForkedProcess, run_command_line
from inference_helpers import png, send
from PIL import Image
from typer.testing import CliRunner

from maple.cli import app
from maple.errors import CheckpointError, ConfigError, MapleError
from maple.inference import precision
from maple.inference.prediction_tables import write_predictions
from maple.inference.predictor import ClassProbability, Prediction, UnreadableImage


def predict(*arguments: object, **options: Any) -> Result:
    words = ["predict", *map(str, arguments), "--device", "cpu"]
    return CliRunner().invoke(app, words, catch_exceptions=False, **options)


def rows(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_a_folder_in_order_without_what_is_unreadable(prompts: Path, pictures: Path) -> None:
    done = predict(prompts, pictures, "--recursive", "--json", "--batch-size", 2)
    assert done.exit_code == 1
    found = rows(done.stdout)
    assert [Path(row["source"]).relative_to(pictures).as_posix() for row in found] == [
        *("a.png", "b10.png", "b9.png", "c/x.png")
    ]
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f"maple: {pictures / 'd.png'}: ")
    for row in found:
        assert set(row) == {"source", "best"}
        assert len(row["best"]) == 5
        values = [one["probability"] for one in row["best"]]
        assert values == sorted(values, reverse=True)


@pytest.mark.parametrize(
    ("largest_difference", "expected"),
    [
        (1.0, "note: computed in bfloat16: the first 2 images have the same classes"),
        (0.0, "note: computed in float32: "),
    ],
)
def test_bfloat16_is_used_where_the_processor_has_units_for_it_and_answers_stay(
    largest_difference: float, expected: str, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(png(colour=(60 * number, 200, 90)))
    plain = predict(prompts, tmp_path, "--json", "--zero-shot")
    assert "computed in" not in plain.stderr
    monkeypatch.setattr(precision, "has_bfloat16_units", lambda: True)
    assert predict(prompts, tmp_path, "--json", "--zero-shot").stdout == plain.stdout  # too few images
    monkeypatch.setattr(precision, "WORTHWHILE", 4)
    monkeypatch.setattr(precision, "CHECKED", 2)
    monkeypatch.setattr(precision, "LARGEST_DIFFERENCE", largest_difference)
    chosen = predict(prompts, tmp_path, "--json", "--zero-shot")
    assert expected in chosen.stderr
    wanted = predict(prompts, tmp_path, "--json", "--zero-shot", "--precision", "bf16") if largest_difference else plain
    assert chosen.stdout == wanted.stdout
    assert "computed in" not in wanted.stderr
    assert (chosen.stdout == plain.stdout) == (largest_difference == 0)


def test_an_unknown_precision(prompts: Path, pictures: Path) -> None:
    with pytest.raises(MapleError, match="unknown precision 'int4'; choose one of: fp32, bf16, fp16"):
        predict(prompts, pictures, "--precision", "int4")


def test_a_drafted_photograph_has_nearly_the_same_prediction(prompts: Path, tmp_path: Path) -> None:
    coarse = Image.effect_noise((80, 60), 60).convert("RGB")
    coarse.resize((1280, 960), Image.Resampling.BICUBIC).save(tmp_path / "large.jpg", quality=92)
    (tmp_path / "small.png").write_bytes(png())
    results = []
    for draft in ([], ["--draft"]):
        done = rows(predict(prompts, tmp_path, "--json", *draft).stdout)
        results.append([{best["class"]: best["probability"] for best in row["best"]} for row in done])
    (large, small), (drafted, same) = results
    assert small == same
    assert large.keys() == drafted.keys()
    assert 0 < max(abs(large[name] - drafted[name]) for name in large) < 0.01
    with pytest.raises(ConfigError, match="--features takes the place of images: leave out --draft"):
        predict(prompts, "--features", "x.safetensors", "--draft")


def test_exit_codes(prompts: Path, pictures: Path, tmp_path: Path) -> None:
    good, bad = pictures / "a.png", pictures / "d.png"
    assert predict(prompts, good, pictures / "b9.png").exit_code == 0
    assert predict(prompts, good, bad).exit_code == 1
    none = predict(prompts, bad, tmp_path / "nosuch.png")
    assert (none.exit_code, none.stdout, len(none.stderr.splitlines())) == (2, "", 2)
    assert "nosuch.png: there is no such file" in none.stderr
    assert predict(prompts).exit_code == 2
    assert predict(prompts, good, "--top", 0).exit_code == 2
    with pytest.raises(CheckpointError, match="is not a run folder"):
        predict(tmp_path, good)
    with pytest.raises(ConfigError, match="--json and --csv exclude each other"):
        predict(prompts, good, "--json", "--csv")
    with pytest.raises(MapleError, match="named more than once"):
        predict(prompts, good, "--classes", "cat,cat")


def test_patterns_that_no_shell_expanded(prompts: Path, pictures: Path) -> None:
    whole = predict(prompts, pictures / "b*.png", "--json")
    assert whole.exit_code == 0
    named = [json.loads(line)["source"] for line in whole.stdout.splitlines()]
    assert named == sorted(map(str, pictures.glob("b*.png")))
    assert len(named) > 1
    nothing = predict(prompts, pictures / "nosuch*.png")
    assert (nothing.exit_code, nothing.stdout) == (2, "")
    assert "nosuch*.png: there is no such file" in nothing.stderr


def test_a_run_folder_is_a_run(prompts: Path, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "prompts.safetensors").write_bytes(prompts.read_bytes())
    assert predict(tmp_path / "run", pictures / "a.png").stdout == predict(prompts, pictures / "a.png").stdout


def test_new_names_and_zero_shot_beside(prompts: Path, pictures: Path) -> None:
    done = predict(prompts, pictures / "a.png", "--classes", "red car, [/b]car", "--zero-shot", "--json")
    assert done.exit_code == 0
    assert "2 of 2 class names were not trained (red car, [/b]car)" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    (row,) = rows(done.stdout)
    for which in ("best", "zero_shot"):
        assert {one["class"] for one in row[which]} == {"red car", "[/b]car"}
        assert sum(one["probability"] for one in row[which]) == pytest.approx(1, abs=1e-5)


def test_csv_can_be_read_back(prompts: Path, tmp_path: Path) -> None:
    place = tmp_path / 'odd, "name"\n.png'
    place.write_bytes(png())
    done = predict(prompts, place, "--csv", "--zero-shot", "--top", 2, "--classes", 'a,"b",c')
    read = list(csv.DictReader(io.StringIO(done.stdout)))
    assert [row["source"] for row in read] == [str(place)] * 2
    assert [row["rank"] for row in read] == ["1", "2"]
    assert {row["class"] for row in read} < {"a", '"b"', "c"}
    (row,) = rows(predict(prompts, place, "--json", "--zero-shot", "--classes", 'a,"b",c').stdout)
    beside = {one["class"]: one["probability"] for one in row["zero_shot"]}
    for line, one in zip(read, row["best"], strict=False):
        assert (line["class"], float(line["probability"])) == (one["class"], one["probability"])
        assert float(line["zero_shot_probability"]) == beside[line["class"]]


def test_the_listing(prompts: Path, tmp_path: Path) -> None:
    place = tmp_path / "re\x1b[31md\n.png"
    place.write_bytes(png())
    done = predict(prompts, place, "--top", 3)
    lines = done.stdout.splitlines()
    assert lines[0] == f"{tmp_path}/re\\x1b[31md\\n.png"
    assert len(lines) == 4
    percents = [float(line.split("%")[0].split()[-1]) for line in lines[1:]]
    assert percents == sorted(percents, reverse=True)
    best = rows(predict(prompts, place, "--json").stdout)[0]["best"]
    assert percents == pytest.approx([100 * one["probability"] for one in best[:3]], abs=0.051)
    assert [line.count("█") for line in lines[1:]] == [round(20 * one["probability"]) for one in best[:3]]
    beside = predict(prompts, place, "--zero-shot", "--top", 1, "--classes", "犬,dog")
    assert "trained" in beside.stdout.splitlines()[1]
    (row,) = rows(predict(prompts, place, "--zero-shot", "--json", "--classes", "犬,dog").stdout)
    differs = row["best"][0]["class"] != row["zero_shot"][0]["class"]
    assert ("zero-shot CLIP predicts" in beside.stdout) == differs


def test_standard_input(prompts: Path, pictures: Path) -> None:
    done = predict(prompts, "-", "--json", input=png())
    assert done.exit_code == 0
    (row,) = rows(done.stdout)
    assert row["source"] == "<stdin>"
    assert row["best"] == rows(predict(prompts, pictures / "a.png", "--json").stdout)[0]["best"]
    for content, message in ((b"", "<stdin>: is empty"), (b"junk", "<stdin>: is not an image")):
        done = predict(prompts, "-", input=content)
        assert (done.exit_code, done.stdout) == (2, "")
        assert done.stderr.startswith(f"maple: {message}")


def test_an_address(
    prompts: Path, serve: Callable[[Callable[[BaseHTTPRequestHandler], None]], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    def answer(handler: BaseHTTPRequestHandler) -> None:
        if handler.path == "/red.png":
            send(handler, png())
        else:
            handler.send_error(404)

    url = serve(answer)
    done = predict(prompts, f"{url}/red.png", f"{url}/blue.png", "--json")
    assert done.exit_code == 1
    assert [row["source"] for row in rows(done.stdout)] == [f"{url}/red.png"]
    assert done.stderr == f"maple: {url}/blue.png: the server answers 404 Not Found; check the address\n"


# --- --ask


def test_ask_answers_each_time_and_ends_on_an_empty_line(prompts: Path, pictures: Path) -> None:
    done = predict(prompts, pictures / "a.png", "--ask", "--json", input="red car,spoon\ncat, dog\n\nnot,reached\n")
    assert done.exit_code == 0
    found = rows(done.stdout)
    assert [{one["class"] for one in row["best"]} for row in found] == [{"red car", "spoon"}, {"cat", "dog"}]
    assert done.stderr.count("class names, separated by commas; an empty line ends: ") == 3


@pytest.mark.parametrize("typed", ["cat,dog\n", "cat,dog", ""])
def test_ask_ends_quietly_at_the_end_of_the_input(prompts: Path, pictures: Path, typed: str) -> None:
    done = predict(prompts, pictures / "a.png", "--ask", "--json", input=typed)
    assert done.exit_code == 0
    assert len(done.stdout.splitlines()) == (1 if typed else 0)
    assert done.stderr.endswith("an empty line ends: \n")


def test_ask_goes_on_after_a_bad_list_and_loads_the_model_once(
    prompts: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import maple.inference.torch_predictor as module

    loads = []
    whole = module.load_prompts
    monkeypatch.setattr(module, "load_prompts", lambda *a, **k: loads.append(1) or whole(*a, **k))
    done = predict(
        prompts, pictures / "a.png", pictures / "d.png", "--ask", "--json", "--classes", "a,b", input="c,c\nc,d\n"
    )
    assert done.exit_code == 1
    assert [{one["class"] for one in row["best"]} for row in rows(done.stdout)] == [{"a", "b"}, {"c", "d"}]
    assert "maple: 'c' is named more than once" in done.stderr
    assert loads == [1]


def test_ask_and_a_picture_from_standard_input_exclude_each_other(prompts: Path) -> None:
    with pytest.raises(ConfigError, match="--ask reads class names from standard input"):
        predict(prompts, "-", "--ask")


# --- as a process


def run_in_ascii(arguments: list[str]) -> None:
    """As with PYTHONIOENCODING=ascii."""
    cast(io.TextIOWrapper, sys.stdout).reconfigure(encoding="ascii")
    run_command_line(arguments)


def run_without_reader(arguments: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    sys.stdout = os.fdopen(writing, "w")
    run_command_line(arguments)


def test_a_reader_that_leaves_early_and_names_that_are_not_unicode(prompts: Path, tmp_path: Path) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(3):
        with open(os.fsencode(folder) + b"/caf\xe9%d.png" % number, "wb") as file:
            file.write(png())
    arguments = ["predict", str(prompts), str(folder), "--batch-size", "1"]
    ascii_terminal = ForkedProcess(run_in_ascii, arguments)
    assert ascii_terminal.wait() == 0, ascii_terminal.stderr
    assert "caf\\udce90.png" in ascii_terminal.stdout
    assert "#" in ascii_terminal.stdout
    left = ForkedProcess(run_without_reader, arguments)
    assert left.wait() == 1, "what could not be written"
    assert "Traceback" not in left.stderr


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_rows_in_a_file(suffix: str, prompts: Path, pictures: Path, tmp_path: Path) -> None:
    output = tmp_path / f"out{suffix}"
    if suffix == ".parquet":
        pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install 'maple-clip[ray]'")
    arguments = [prompts, pictures, "--top", 2, "--reject", 0.99, "--zero-shot"]
    done = predict(*arguments, "--output", output)
    assert (done.exit_code, done.stdout) == (1, "")
    shown = rows(predict(*arguments, "--json").stdout)
    if suffix == ".csv":
        with output.open(newline="") as file:
            table = list(csv.DictReader(file))
        best = [[row["class_1"], row["class_2"]] for row in table]
        assert table[0]["zero_shot_class_1"] == shown[0]["zero_shot"][0]["class"]
        assert [row["rejected"] for row in table] == ["true", "true", "true", ""]
    else:
        if suffix == ".jsonl":
            table = rows(output.read_text())
        else:
            import pyarrow.parquet as pq

            table = pq.read_table(output).to_pylist()
        best = [row["classes"] for row in table]
        assert table[0]["probabilities"] == pytest.approx([item["probability"] for item in shown[0]["best"]])
        assert [row["rejected"] for row in table] == [True, True, True, None]
    assert best[:3] == [[item["class"] for item in row["best"]] for row in shown]
    assert [row["path"] for row in table] == [*(row["source"] for row in shown), str(pictures / "d.png")]
    assert [bool(row["error"]) for row in table] == [False, False, False, True]
    assert "cannot be decoded" in str(table[3]["error"])
    with pytest.raises(ConfigError, match="exists; choose another output, or remove it"):
        predict(prompts, pictures, "--output", output)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_names_that_are_not_unicode_are_escaped_in_a_file(suffix: str, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    results = [
        Prediction("\udcff.png", (ClassProbability("K\udce4se", 0.5),)),
        UnreadableImage("\udcfe.png", "\udcfe.png: is empty"),
    ]
    path = tmp_path / f"out{suffix}"
    assert list(write_predictions(path, results, top=1)) == results
    if suffix == ".csv":
        with path.open(newline="", encoding="utf-8") as file:
            table = [{**row, "classes": [row["class_1"]]} for row in csv.DictReader(file)]
    else:
        table = parquet.read_table(path).to_pylist()
    assert [row["source"] for row in table] == ["\\udcff.png", "\\udcfe.png"]
    assert table[0]["classes"] == ["K\\udce4se"]
    assert table[1]["error"] == "\\udcfe.png: is empty"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--executor", "spark"], "unknown executor 'spark'; choose one of: local, ray"),
        (["--actors", "2"], "--actors without --executor ray has no effect"),
        (["--executor", "ray"], "--executor ray needs the folder of its results: --output NAME.parquet"),
        (["--executor", "ray", "--output", "x.csv"], "needs the folder of its results, not x.csv"),
        (["--output", "x.txt"], r"output 'x.txt': predictions are written to a file named .parquet, .csv, .jsonl"),
        (["--output", "x.csv", "--json"], "--json cannot be used with --output"),
    ],
)
def test_refused_outputs(words: list[str], message: str, prompts: Path, pictures: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        predict(prompts, pictures, *words)
