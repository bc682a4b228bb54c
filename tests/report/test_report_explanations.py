"""What `maple explain` leaves in a run stands on the page; a damaged file is listed."""

import base64
import json
from pathlib import Path

from report_rows import METHODS, MakeRun

from maple.report import write_report

PNG = b"\x89PNG\r\n\x1a\n and more"


def explained(run: Path, count: int = 2) -> Path:
    folder = run / "explanation"
    folder.mkdir()
    maps = []
    for number in range(1, count + 1):
        (folder / f"{number:03}_a.png").write_bytes(PNG + bytes([number]))
        maps.append({"source": f"<{number}>.png", "class": "cat", "png": f"{number:03}_a.png"})
    (folder / "maps.json").write_text(json.dumps({"maps": maps, "left_out": []}))
    token = {"by_distance": [{"word": "<b>", "distance": 0.5}], "by_cosine": [{"word": "photo", "cosine": 0.25}]}
    words = {"warning": "Read with care.", "notes": ["1 deeper layer."], "sets": [{"class": None, "tokens": [token]}]}
    (folder / "words.json").write_text(json.dumps(words))
    return folder


def page(runs: Path) -> str:
    write_report(runs, methods=METHODS)
    return (runs / "report.html").read_text(encoding="utf-8")


def test_maps_and_words_are_shown(make_run: MakeRun, runs: Path) -> None:
    explained(make_run("maple", base=0.8, novel=0.6))
    text = page(runs)
    for number in (1, 2):
        assert base64.b64encode(PNG + bytes([number])).decode() in text
    assert "&lt;1&gt;.png: maps for cat" in text
    assert "&lt;b&gt; (0.500)" in text
    assert "photo (0.250)" in text
    assert "1 deeper layer. Read with care." in text


def test_no_more_than_a_few(make_run: MakeRun, runs: Path) -> None:
    explained(make_run("maple", base=0.8, novel=0.6), count=40)
    text = page(runs)
    assert text.count("data:image/png") == 4
    assert "4 of 40 images" in text


def test_pages_without_them_are_as_before(make_run: MakeRun, runs: Path) -> None:
    make_run("maple", base=0.8, novel=0.6)
    assert "Where it looks" not in page(runs)


def test_damaged_files_are_listed(make_run: MakeRun, runs: Path) -> None:
    folder = explained(make_run("maple", base=0.8, novel=0.6))
    (folder / "001_a.png").write_bytes(b"<svg>")
    (folder / "words.json").write_text('{"sets": 3}')
    text = page(runs)
    assert "001_a.png</code>: unreadable or damaged: it is not a PNG" in text
    assert "words.json</code>: unreadable or damaged" in text
    (folder / "maps.json").write_text(json.dumps({"maps": [{"source": "a", "class": "b", "png": "../../x.png"}]}))
    assert "maps.json</code>: unreadable or damaged" in page(runs)
