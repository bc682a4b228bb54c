"""The formats as files, and the command."""

import csv
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from report_rows import METHODS, MakeRun, predictions, row
from typer.testing import CliRunner

from maple.cli import app
from maple.errors import ConfigError
from maple.report import Report, write_report
from maple.report.write import latex_text


def test_formats_go_where_they_are_asked_for(make_run: MakeRun, runs: Path, tmp_path: Path) -> None:
    make_run("maple", base=0.5, novel=0.5)
    _, written = write_report(runs, ["markdown", "csv"], methods=METHODS)
    assert written == [runs / "report.md", runs / "report.csv"]
    _, written = write_report(runs, ["latex"], tmp_path / "new" / "table.tex", methods=METHODS)
    assert written == [tmp_path / "new" / "table.tex"]
    _, written = write_report(runs, ["latex", "markdown"], tmp_path / "folder", methods=METHODS)
    assert written == [tmp_path / "folder" / "report.tex", tmp_path / "folder" / "report.md"]


@pytest.mark.parametrize(
    ("name", "start"), [("t.html", "<!DOCTYPE"), ("t.md", "MaPLe"), ("t.tex", "%"), ("t.csv", "run,"), ("t", None)]
)
def test_without_a_format_the_name_of_the_file_says_it(
    name: str, start: str | None, make_run: MakeRun, runs: Path, tmp_path: Path
) -> None:
    make_run("maple", base=0.5, novel=0.5)
    _, (written,) = write_report(runs, output=tmp_path / name, methods=METHODS)
    assert written == (tmp_path / name if start else tmp_path / name / "report.html")
    assert written.read_text().startswith(start or "<!DOCTYPE")


def test_refused_without_writing(make_run: MakeRun, runs: Path, tmp_path: Path) -> None:
    make_run("maple", base=0.5, novel=0.5)
    with pytest.raises(ConfigError, match="unknown format 'pdf'; choose one of: html, markdown, latex, csv"):
        write_report(runs, ["markdown", "pdf"], methods=METHODS)
    with pytest.raises(ConfigError, match="is one file, but 2 formats"):
        write_report(runs, ["markdown", "csv"], tmp_path / "table.md", methods=METHODS)
    with pytest.raises(ConfigError, match=r"a file of latex that ends as one of markdown; name it table\.tex, or"):
        write_report(runs, ["latex"], tmp_path / "table.md", methods=METHODS)
    (tmp_path / "taken").write_text("")
    with pytest.raises(ConfigError, match="taken is a file; name a folder"):
        write_report(runs, ["markdown"], tmp_path / "taken", methods=METHODS)
    assert not list(runs.glob("report.*"))


def test_csv_has_a_line_for_each_evaluation(make_run: MakeRun, runs: Path) -> None:
    make_run("maple", base=0.1 + 0.2, novel=0.5, source={"shots": None}, train={"lr": 0.01})
    make_run("zero_shot", base=0.5)
    lines = list(csv.DictReader(io.StringIO(Report(runs, METHODS).text("csv"))))
    assert len(lines) == 3
    first = lines[0]
    assert (first["run"], first["method"], first["classes"], first["seed"]) == ("pets_maple_1", "maple", "base", "1")
    assert float(first["top1"]) == 0.1 + 0.2, "as it was measured"
    assert first["shots"] == "all"
    assert "prompt_depth=9" in first["settings"]
    assert "lr=0.01" in first["settings"]


def test_latex_is_escaped_and_whole(make_run: MakeRun, runs: Path) -> None:
    assert latex_text("a_b & 5% $x$ {y} \\ ± −1") == r"a\_b \& 5\% \$x\$ \{y\} \textbackslash{} $\pm$ $-$1"
    for seed in (1, 2):
        make_run("maple", "my_pets", seed, base=0.5 + seed / 10, novel=0.5)
        make_run("coop", "my_pets", seed, base=0.5, novel=0.5)
    text = Report(runs, METHODS).text("latex")
    assert r"MaPLe & \textbf{65.00} {\scriptsize $\pm$ 7.07} & \textbf{50.00} {\scriptsize $\pm$ 0.00}" in text
    assert r"\emph{my\_pets}" in text
    for environment in ("table", "tabular"):
        assert text.count(rf"\begin{{{environment}}}") == text.count(rf"\end{{{environment}}}") == 1
    rules = [text.index(rule) for rule in (r"\toprule", r"\midrule", r"\bottomrule")]
    assert rules == sorted(rules)


def test_markdown_lists_what_is_missing(make_run: MakeRun, runs: Path) -> None:
    run = make_run("maple", base=0.5, novel=0.6)
    make_run("coop", seed=2)
    with (run / "rows.jsonl").open("a") as file:
        file.write("{}\n")
    text = Report(runs, METHODS).text("markdown")
    assert "| MaPLe | 50.00 | 60.00 | 54.55 | 1 |" in text
    assert "## Runs without an evaluation\n\n- pets\\_coop\\_2: finished, but not evaluated" in text
    assert "## Left out\n\n- pets\\_maple\\_1/rows.jsonl line 3: not an evaluation" in text


def test_the_command(make_run: MakeRun, runs: Path, tmp_path: Path) -> None:
    """From the images of a folder to a page with their thumbnails; of those outside the data set it shows none."""
    images = tmp_path / "pets"
    for name in ("cat", "dog"):
        (images / name).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (200, 100), "red").save(images / name / f"{number}.png")
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "secret.png")
    for method, right in (("zero_shot", 2), ("maple", 3)):
        kept = predictions(4, 2, right)
        kept["paths"] = np.array(["cat/0.png", "dog/1.png", "cat/2.png", "../secret.png"])
        kept["opened"] = np.array([str(images), ""])
        source = {"dataset": str(images), "classes": "all"}
        one = row(method, "pets", 1, "all", right / 4, ["cat", "dog"], images=4, source=source)
        make_run(method, rows=[one], kept={"all": kept})
    result = CliRunner().invoke(app, ["report", str(runs)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "MaPLe reaches 75.0 % accuracy on all classes" in result.output.replace("\n", " ")
    html = (runs / "report.html").read_text()
    assert html.count('<img src="data:image/png;base64,') == 3
    assert '<div class="missing">../secret.png</div>' in html


def test_the_command_tells_what_it_left_out(make_run: MakeRun, runs: Path, tmp_path: Path) -> None:
    make_run("maple", base=0.5, novel=0.5)
    make_run("coop")
    arguments = ["report", str(runs), "--format", "csv,markdown", "--output", str(tmp_path / "out")]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert "left out: pets_coop_1: finished, but not evaluated" in result.output
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.csv", "report.md"]


HOSTILE_NAMES = [
    *("<script>alert(1)</script>", "a\"b'c", "p|q", "back\\slash", "50% $x & a_b {c} ^~#", "=cmd()|A1", "+1", "@x"),
    *("two\nlines\r", "\u202emirrored", "\x1b[31mred\x1b]0;t\x07", "half\ud800"),
    "</script><img src=x onerror=alert(2)>",
]


def test_hostile_names_are_text_in_every_format(make_run: MakeRun, runs: Path, tmp_path: Path) -> None:
    for number, name in enumerate(HOSTILE_NAMES):
        for method, top1 in (("zero_shot", 0.4), ("maple", 0.5)):
            names = [name, f"other {name}"]
            kept = {"base": predictions(10, 2, 5)}
            make_run(method, name, base=top1, novel=top1, names=names, kept=kept, folder=f"{number}_{method}")
    write_report(runs, ["html", "markdown", "latex", "csv"], tmp_path / "out", methods=METHODS)
    texts = {path.suffix: path.read_bytes().decode() for path in (tmp_path / "out").iterdir()}
    for text in texts.values():
        assert not set(text) & {"\x1b", "\x07", "\u202e"}

    class Page(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            assert tag != "script"
            assert not [key for key, value in attrs if key.startswith("on") or value == "x"]

    Page().feed(texts[".html"])
    for block in re.findall(r"(?:^\|.*\n)+", texts[".md"], re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in block.splitlines()}) == 1
    assert not re.search(r"(?<!\\)<", texts[".md"])
    for part in (r"\$x \& a\_b \{c\} \textasciicircum{}\textasciitilde{}\#", r"back\textbackslash{}slash", r"50\% "):
        assert part in texts[".tex"]
    table = list(csv.DictReader(io.StringIO(texts[".csv"], newline="")))
    assert len(table) == 4 * len(HOSTILE_NAMES)
    assert {line["dataset"] for line in table} >= {"'=cmd()|A1", "'+1", "'@x", "two lines", "p|q"}
    assert not [value for line in table for value in line.values() if value[:1] in set("=+-@")]
