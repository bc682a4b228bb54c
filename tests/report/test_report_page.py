"""The page: whole, self-contained, safe with any name, and honest about what it shows."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_rows import METHODS, MakeRun, predictions, row

from maple.report import Report
from maple.report.predictions import choose_examples, evenly, pair_predictions, shares
from maple.report.records import Problem

PNG = b"\x89PNG\r\n\x1a\n-not-really"


class Tags(HTMLParser):
    """Every tag with its attributes; that tags are closed in order."""

    VOID = frozenset({"meta", "img", "br", "wbr", "path", "use", "rect"})

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def parse(html: str) -> Tags:
    tags = Tags()
    tags.feed(html)
    assert not tags.open
    return tags


def both(images: int, classes: int, right: int, **options: Any) -> dict[str, dict[str, Any]]:
    return {part: predictions(images, classes, right, **options) for part in ("base", "novel")}


@pytest.fixture
def two_methods(make_run: MakeRun) -> None:
    make_run("zero_shot", base=0.5, novel=0.4, kept=both(10, 2, 5))
    for seed in (1, 2):
        make_run("maple", seed=seed, base=0.6 + seed / 10, novel=0.5, kept=both(10, 2, 8, seed=seed))


@pytest.mark.usefixtures("two_methods")
def test_it_is_whole_and_needs_nothing_else(runs: Path) -> None:
    asked: list[tuple[str, str | None, str]] = []
    html = Report(runs, METHODS).text("html", lambda *what: (asked.append(what), PNG)[1])
    tags = parse(html)
    for tag, attributes in tags.found:
        assert tag not in ("script", "link", "iframe", "object")
        for name in ("src", "href", "xlink:href"):
            if value := attributes.get(name):
                assert value.startswith(("data:image/png;base64,", "#")), value
    assert "url(http" not in html
    assert "@import" not in html
    ids = [attributes["id"] for _, attributes in tags.found if "id" in attributes]
    assert len(ids) == len(set(ids)), "figures do not share ids"
    targets = {value[1:] for _, attributes in tags.found if (value := attributes.get("href") or "").startswith("#")}
    assert targets <= set(ids)
    assert set(re.findall(r"url\(#([^)]+)\)", html)) <= set(ids)
    assert sum(tag == "svg" for tag, _ in tags.found) == 4, "results, curves, classes, features"
    assert sum(tag == "img" for tag, _ in tags.found) == 20
    assert {(dataset, root) for dataset, root, _ in asked} == {("pets", "/root")}
    assert "maple train --method maple" in html
    assert "prefers-color-scheme: dark" in html


@pytest.mark.usefixtures("two_methods")
def test_it_is_the_same_every_time(runs: Path) -> None:
    assert Report(runs, METHODS).text("html") == Report(runs, METHODS).text("html")


@pytest.mark.usefixtures("two_methods")
def test_an_image_that_cannot_be_read_leaves_its_name(runs: Path) -> None:
    html = Report(runs, METHODS).text("html", lambda *_: None)
    assert "<img" not in html
    assert '<div class="missing">3.png</div>' in html


def test_names_are_text_and_nothing_else(make_run: MakeRun, runs: Path) -> None:
    names = ['<script>alert("a")</script>', r"50% $x_1$ & \alpha {b} ^~#|"]
    for method, right in (("zero_shot", 3), ("maple", 7)):
        kept = {"all": predictions(10, 2, right)}
        one = row(method, "pets & <b>", 1, "all", right / 10, names, source={"classes": "all"})
        make_run(method, "pets & <b>", rows=[{**one, "per_class": [right / 10, 0.1]}], kept=kept)
    report = Report(runs, METHODS)
    html = report.text("html")
    parse(html)
    assert "<script" not in html
    assert "<b>" not in html
    assert html.count("&lt;script&gt;alert") > 2, "in the cards and in the figures"
    assert "$x_1$" in html, "no mathematics is made of it"
    assert "pets &amp; &lt;b&gt;" in html
    assert r"pets \& \textless{}b\textgreater{}" in report.text("latex")
    assert r"pets & \<b\>" in report.text("markdown")


def test_a_data_set_with_a_backslash_in_its_name(make_run: MakeRun, runs: Path) -> None:
    make_run("coop", r"C:\x\1 pets\g<0>", base=0.5, novel=0.4)
    assert r'aria-label="Learning curves on C:\x\1 pets\g&lt;0&gt;"' in Report(runs, METHODS).text("html")


@pytest.mark.parametrize("features", [True, False], ids=["features", "without"])
def test_one_image_of_one_class(features: bool, make_run: MakeRun, runs: Path) -> None:
    for method in ("zero_shot", "maple"):
        one = row(method, "pets", 1, "all", 1.0, ["cat"], images=1, source={"classes": "all"})
        make_run(method, rows=[one], kept={"all": predictions(1, 1, 1, features=features)})
    html = Report(runs, METHODS).text("html")
    parse(html)
    assert "Right both times" in html


def test_without_features_there_is_no_plane(make_run: MakeRun, runs: Path) -> None:
    make_run("zero_shot", base=0.5, novel=0.5, kept=both(10, 2, 5))
    make_run("cocoop", base=0.6, novel=0.6, kept=both(10, 2, 6, features=False))
    html = Report(runs, METHODS).text("html")
    assert "Fixed by the method" in html
    assert "Image features of" not in html


def test_without_predictions_there_are_still_tables(make_run: MakeRun, runs: Path) -> None:
    make_run("zero_shot", base=0.5, novel=0.5)
    make_run("maple", base=0.6, novel=0.6)
    html = Report(runs, METHODS).text("html")
    parse(html)
    assert "60.00" in html
    assert "image by image" not in html


@pytest.mark.parametrize("damage", ["cut", "other", "gone", "pickle"])
def test_damaged_predictions_are_listed_and_do_no_harm(damage: str, make_run: MakeRun, runs: Path) -> None:
    make_run("zero_shot", base=0.5, kept=both(10, 2, 5))
    run = make_run("maple", base=0.6, kept=both(10, 2, 5))
    path = run / "predictions" / "base.npz"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:300])
    elif damage == "other":
        np.savez(path, **predictions(7, 2, 5))
    elif damage == "pickle":
        np.savez(path, **{**predictions(10, 2, 5), "paths": np.array([{}] * 10, dtype=object)})
    else:
        path.unlink()
    html = Report(runs, METHODS).text("html")
    assert "pets_maple_1/predictions/base.npz" in html
    assert "image by image" not in html


def test_images_are_chosen_by_rule(make_run: MakeRun, runs: Path) -> None:
    make_run("zero_shot", base=0.5, kept={"base": predictions(100, 2, 50)}, images=100)
    make_run("maple", base=0.9, kept={"base": predictions(100, 2, 90)}, images=100)
    (group,) = Report(runs, METHODS).groups
    problems: list[Problem] = []
    _, pairs = pair_predictions(group, group.variants[1], "pets", problems)
    assert len(pairs) == 1
    assert not problems
    outcomes = choose_examples(pairs, 10)
    assert [(outcome.name, outcome.count, len(outcome.shown)) for outcome in outcomes] == [
        ("fixed", 40, 3),
        ("regressed", 0, 0),
        ("both right", 50, 4),
        ("both wrong", 10, 3),
    ]
    assert [example.path for example in outcomes[0].shown] == ["56.png", "70.png", "83.png"]
    assert all(not one.before.right and one.after.right for one in outcomes[0].shown)
    assert outcomes[0].shown[0].before.name != outcomes[0].shown[0].truth == outcomes[0].shown[0].after.name


def test_shares() -> None:
    assert shares([10, 20, 70, 0], 10, fewest=0) == [1, 2, 7, 0]
    assert shares([1, 1, 98, 0], 10, fewest=3) == [1, 1, 8, 0]
    assert shares([2, 1, 0, 0], 10) == [2, 1, 0, 0]
    assert evenly(10, 2) == [2, 7]
    assert evenly(3, 3) == [0, 1, 2]
    assert evenly(5, 0) == []


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"zero_shot": (0.5, 0.5), "maple": (0.8, 0.6)}, "18.6 points above zero-shot CLIP, which reaches 50.0 %"),
        ({"zero_shot": (0.5, 0.5), "maple": (0.4, 0.4)}, "10.0 points below zero-shot CLIP, which reaches 50.0 %"),
        ({"zero_shot": (0.5, 0.5), "maple": (0.5, 0.5)}, "That equals zero-shot CLIP"),
        ({"zero_shot": (0.5, 0.5), "maple": (0.6, 0.6), "vpt": (0.7, 0.7)}, "The best here is VPT with 70.0 %."),
        ({"zero_shot": (0.5, 0.5), "coop": (0.6, 0.6)}, "CoOp reaches a harmonic mean of 60.0 %"),
        ({"zero_shot": (0.5, 0.5)}, "Zero-shot CLIP reaches a harmonic mean of 50.0 %"),
        ({"maple": (0.6, 0.6)}, "MaPLe reaches a harmonic mean of 60.0 %"),
        ({"maple": (0.6, None)}, "No method has results on every data set yet"),
    ],
)
def test_the_headline_says_what_is_there(
    values: dict[str, tuple[float, float | None]], said: str, make_run: MakeRun, runs: Path
) -> None:
    for method, (base, novel) in values.items():
        make_run(method, base=base, novel=novel)
    assert said in Report(runs, METHODS).headline


def test_the_headline_of_a_transfer_is_about_the_targets(make_run: MakeRun, runs: Path) -> None:
    source = {"dataset": "photos", "classes": "all"}
    accuracies = {"photos": 0.9, "sketches": 0.4, "prints": 0.6}
    rows = [row("maple", name, 1, "all", top1, ["a", "b"], source=source) for name, top1 in accuracies.items()]
    make_run("maple", "photos", rows=rows)
    headline = Report(runs, METHODS).headline
    assert headline.startswith("MaPLe, trained on photos, reaches 50.0 % accuracy on all classes on average over 2")


def test_the_headline_tells_chance_from_effect(make_run: MakeRun, runs: Path) -> None:
    for seed, value in ((1, 0.4), (2, 0.7)):
        make_run("maple", seed=seed, base=value, novel=value)
        make_run("zero_shot", seed=seed, base=0.5, novel=0.5)
    assert "5.0 points above" in Report(runs, METHODS).headline
    assert "smaller than the spread over seeds (± 21.2)" in Report(runs, METHODS).headline


def test_matplotlib_is_left_as_it_was(make_run: MakeRun, runs: Path) -> None:
    import matplotlib

    make_run("maple", base=0.5, novel=0.5)
    before = dict(matplotlib.rcParams)
    Report(runs, METHODS).text("html")
    assert dict(matplotlib.rcParams) == before


@pytest.mark.slow
@pytest.mark.usefixtures("two_methods")
def test_no_report_loads_torch_and_tables_load_no_plots(runs: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from maple.report import Report;"
        f"report = Report(Path({str(runs)!r}), {{}});"
        "[report.text(kind) for kind in ('markdown', 'latex', 'csv')];"
        "print(sorted({'matplotlib', 'jinja2', 'sklearn'} & set(sys.modules)));"
        "report.text('html');"
        "print(sorted({'torch', 'open_clip', 'torchvision'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["[]", "[]"]
