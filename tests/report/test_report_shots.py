"""Accuracy against shots: which runs make a curve, and its numbers, against ones computed by hand."""

from pathlib import Path

from report_rows import METHODS, MakeRun, row

from maple.report import Report
from maple.report.series import ShotCurves
from maple.report.tables import Table


def few_shot(
    make_run: MakeRun, method: str, shots: int | None, values: list[float], dataset: str = "pets", **settings: object
) -> None:
    for seed, top1 in enumerate(values, start=1):
        source = {"shots": shots, "classes": "all"}
        one = row(method, dataset, seed, "all", top1, ["a", "b"], source=source, settings=settings)
        folder = "-".join(map(str, [dataset, method, shots, seed, *settings.values()]))
        make_run(method, dataset, seed, folder=folder, rows=[one], train={"epochs": 200 if shots == 16 else 50})


def curves(runs: Path) -> ShotCurves:
    (found,) = Report(runs, METHODS).curves
    return found


def texts(table: Table, section: int = 0) -> dict[str, list[str]]:
    return {label: [cell.plain for cell in cells] for label, cells in table.sections[section].rows}


def test_mean_over_data_sets_and_each(make_run: MakeRun, runs: Path) -> None:
    few_shot(make_run, "zero_shot", 16, [0.5])
    few_shot(make_run, "zero_shot", 16, [0.3], "cars")
    for shots, first in ((1, 0.4), (4, 0.6), (16, 0.7)):
        few_shot(make_run, "coop", shots, [first, first + 0.1])
        few_shot(make_run, "coop", shots, [first - 0.2, first - 0.1], "cars")
    few_shot(make_run, "maple", 16, [0.9, 0.9])  # not on cars, and nowhere else
    mean, each = Report(runs, METHODS).tables[:2]
    assert mean.caption == "Accuracy on all classes against shots: tiny"
    assert mean.sections[0].columns == ("Method", "1 shot", "4 shots", "16 shots")
    found = texts(mean)
    # Epochs differ from one number of shots to the next: one method all the same. Seeds' own means: .3, .4.
    assert found["CoOp"] == ["35.00 ± 7.07", "55.00 ± 7.07", "65.00 ± 7.07"]
    assert found["zero-shot CLIP"] == ["40.00"] * 3
    assert found["MaPLe"] == ["–"] * 3
    assert [section.title for section in each.sections] == ["cars", "pets"]
    assert texts(each, 1)["MaPLe"] == ["–", "–", "90.00 ± 0.00"]
    assert texts(each, 0)["CoOp"][0] == "25.00 ± 7.07"
    assert "over 2 seeds" in mean.notes[0]


def test_zero_shot_of_several_seeds_has_no_spread_where_its_images_are_the_same(make_run: MakeRun, runs: Path) -> None:
    few_shot(make_run, "coop", 16, [0.5, 0.5, 0.5])
    few_shot(make_run, "zero_shot", 16, [0.5, 0.5, 0.5])
    (table,) = Report(runs, METHODS).tables[:1]
    assert texts(table) == {"zero-shot CLIP": ["50.00", "3"], "CoOp": ["50.00 ± 0.00", "3"]}
    for seed, top1 in enumerate([0.3, 0.4], start=1):  # each seed has held out other images
        source = {"shots": 16, "classes": "all"}
        for method in ("coop", "zero_shot"):
            one = row(method, "own", seed, "all", top1, ["a", "b"], source=source, items=str(seed))
            make_run(method, "own", seed, rows=[one])
    (table,) = Report(runs, METHODS).tables[:1]
    assert texts(table)["zero-shot CLIP"][:2] == ["35.00 ± 7.07", "50.00"]


def test_settings_that_differ_at_one_number_of_shots_name_the_method_at_all(make_run: MakeRun, runs: Path) -> None:
    for shots in (1, 2):
        few_shot(make_run, "maple", shots, [0.5], prompt_depth=9)
    few_shot(make_run, "maple", 2, [0.7], prompt_depth=1)
    found = texts(Report(runs, METHODS).tables[0])
    assert found == {"MaPLe (prompt_depth=1)": ["–", "70.00"], "MaPLe (prompt_depth=9)": ["50.00", "50.00"]}


def test_what_makes_no_curve(make_run: MakeRun, runs: Path) -> None:
    few_shot(make_run, "coop", 16, [0.5])
    few_shot(make_run, "coop", None, [0.9])
    few_shot(make_run, "zero_shot", 1, [0.4])
    assert Report(runs, METHODS).curves == [], "one number of shots, and all images"


def test_base_to_novel_at_several_shots(make_run: MakeRun, runs: Path) -> None:
    for shots, base in ((4, 0.6), (16, 0.8)):
        make_run("maple", base=base, novel=0.4, folder=str(shots), source={"shots": shots})
    (table, *_) = Report(runs, METHODS).tables
    assert table.caption == "Base-to-novel generalisation against shots: tiny"
    assert texts(table) == {"MaPLe": ["48.00", "53.33"]}  # 2 * .24 / 1, 2 * .32 / 1.2
    page = Report(runs, METHODS).text("html")
    assert "Base, novel and harmonic mean against training images per class: pets" in page


def test_the_page_draws_it_and_the_headline_has_most_shots(make_run: MakeRun, runs: Path) -> None:
    for dataset in ("pets", "cars"):
        few_shot(make_run, "zero_shot", 1, [0.5], dataset)
        for shots in (1, 2, 8):
            for method in ("coop", "maple"):
                few_shot(make_run, method, shots, [0.1 * shots, 0.1 * shots], dataset)
    report = Report(runs, METHODS)
    assert "8 shots, 2 seeds" in report.headline
    page = report.text("html")
    assert "Accuracy against training images per class: the mean over 2 data sets." in page
    assert 'aria-label="Accuracy of 3 methods at 3 shots"' in page
    assert 'aria-label="The same on each of 2 data sets"' in page
    assert report.text("latex").count(r"\caption{Accuracy on all classes against shots: tiny") == 2
