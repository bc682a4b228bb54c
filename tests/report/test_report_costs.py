"""The complexity table: numbers against a division by hand, published ones with their source, damaged files."""

import csv
import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from report_rows import METHODS, MakeRun

from maple.errors import DataError
from maple.report import Report, write_report
from maple.report.collect import read_costs


def record(recipe: str, name: str | None = None, **changes: Any) -> dict[str, Any]:
    return {
        "recipe": recipe,
        "method": {"name": name or recipe, "prompt_length": 4},
        "backbone": "ViT-B-16",
        "precision": "fp32",
        "image_size": 224,
        "backbone_parameters": 1_000_000,
        "classes": 50,
        "device": "cpu",
        "machine": "a machine, 1 thread",
        "parameters": 2_048,
        "flops_plain": 334_000_000_000,
        "flops": 80_000_000_000,
        "flops_cached": None,
        "speeds": [
            {"batch": 4, "training": None, "inference": 12.3456, "cached": None},
            {"batch": 100, "training": 5.0, "inference": 1353.2, "cached": 2.0},
        ],
        "environment": {"command": ["maple", "efficiency"], "started": "2026-01-01", "versions": {"torch": "2.6"}},
        **changes,
    }


def write(folder: Path, *records: dict[str, Any]) -> None:
    (folder / "complexity").mkdir(parents=True, exist_ok=True)
    for one in records:
        number = len(list((folder / "complexity").iterdir()))
        (folder / "complexity" / f"{number}.json").write_text(json.dumps(one))


def test_one_table_over_methods(tmp_path: Path) -> None:
    zero = record("zero_shot", parameters=0, method={"name": "zero_shot"})
    write(tmp_path, record("maple-shallow", "maple"), record("tip-adapter-f", "tip_adapter"), zero, record("coop"))
    counted, timed, published = Report(tmp_path, METHODS).tables
    assert counted.caption == "Complexity: ViT-B-16, fp32, 50 classes, on a machine, 1 thread"
    rows = {label: [cell.text for cell in cells] for label, cells in counted.sections[0].rows}
    assert list(rows) == ["zero-shot CLIP", "CoOp", "MaPLe-shallow", "Tip-Adapter-f"], "in the order of all tables"
    assert rows["CoOp"] == ["2,048", "0.205", "167", "40", "–"], "a multiply-add is one operation in GFLOPs"
    assert rows["zero-shot CLIP"][:2] == ["0", "0"]
    assert [section.title for section in timed.sections] == [
        "Training",
        "Inference, classes each time",
        "Inference, classes cached",
    ]
    assert timed.sections[1].columns == ("Method", "Batch 4", "Batch 100")
    assert [cell.text for cell in timed.sections[0].rows[1][1]] == ["–", "5"]
    assert [cell.text for cell in timed.sections[1].rows[1][1]] == ["12.35", "1,353"]
    assert [label for section in published.sections for label, _ in section.rows] == ["CoOp"] * 3


def test_published_costs_name_their_source_and_fit(tmp_path: Path) -> None:
    maple = record("maple", method={"name": "maple", "prompt_length": 2})
    write(tmp_path, maple, record("cocoop"))
    (table,) = Report(tmp_path, METHODS).tables[2:]
    sections = {section.title.partition(":")[0].partition(",")[0]: section for section in table.sections}
    assert list(sections) == ["PromptKD (CVPR 2024)", "Koorye/SkipTuning 8c4636e", "README of htyao89/KgCoOp"]
    assert [cell.text for cell in sections["PromptKD (CVPR 2024)"].rows[0][1]] == ["162.5", "15.08"]
    skip = sections["Koorye/SkipTuning 8c4636e"]
    assert (skip.columns, [label for label, _ in skip.rows]) == (
        ("Method", "Training, s", "Memory, MB"),
        ["CoCoOp", "MaPLe"],
    )
    text = Report(tmp_path, METHODS).text("markdown")
    assert "167.0" not in text
    assert "60.2" not in text, "recalled from memory, so not to be presented as published"


def test_published_costs_of_a_recipe_on_another_method(tmp_path: Path) -> None:
    """Those of DePT are of DePT on KgCoOp."""
    for recipe, base in (("dept", "coop"), ("dept-kgcoop", "kgcoop")):
        write(tmp_path, record(recipe, method={"name": "dept", "base_method": base}))
    write(tmp_path, record("tcp"))
    (table,) = Report(tmp_path, METHODS).tables[2:]
    shown = {label: [cell.text for cell in cells] for label, cells in table.sections[0].rows}
    assert shown == {"TCP": ["619", "3,189"], "DePT-kgcoop": ["733", "1,714"]}


@pytest.mark.parametrize(
    "changes", [{"backbone": "ViT-L-14"}, {"recipe": "coop-dagger"}, {"method": {"name": "coop", "prompt_length": 16}}]
)
def test_nothing_published_where_it_does_not_fit(changes: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path, {**record("coop"), **changes})
    assert len(Report(tmp_path, METHODS).tables) == 2


def test_conditions_are_not_mixed_and_the_later_counts(tmp_path: Path) -> None:
    later = {**record("coop")["environment"], "started": "2026-02-01"}
    write(tmp_path / "b", record("coop", parameters=1, environment=later))
    write(tmp_path / "a", record("coop", parameters=2), record("coop", classes=100), record("coop", machine="b"))
    tables = [table for table in Report(tmp_path, METHODS).tables if table.caption.startswith("Complexity")]
    assert [len(table.sections[0].rows) for table in tables] == [1, 1, 1]
    assert {row[1][0].text for table in tables for row in table.sections[0].rows} == {"1", "2,048"}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "Expecting property name"),
        ("[]", "should be a valid dictionary"),
        (json.dumps(record("coop", flops=-1)), "flops: Input should be greater"),
        (json.dumps({**record("coop"), "speeds": [{"batch": 1, "inference": None}]}), "speeds.0.inference"),
        ("\\ud800", "Expecting value"),
    ],
)
def test_damaged_records_cost_themselves_alone(content: str, reason: str, tmp_path: Path) -> None:
    write(tmp_path, record("coop"))
    (tmp_path / "complexity" / "bad.json").write_text(content)
    collection = Report(tmp_path, METHODS).collection
    assert len(collection.costs) == 1
    (problem,) = collection.problems
    assert problem.place == "complexity/bad.json"
    assert reason in problem.reason


def test_beside_runs_and_in_every_format(make_run: MakeRun, runs: Path, tmp_path: Path) -> None:
    make_run("maple", base=0.8, novel=0.6)
    write(runs, record("coop"))
    report, written = write_report(runs, ["html", "markdown", "latex", "csv"], tmp_path / "out", methods=METHODS)
    assert [path.name for path in written] == [
        *("report.html", "report.md", "report.tex", "report.csv", "report_complexity.csv"),
    ]
    assert report.headline.startswith("MaPLe reaches")
    page, markdown, latex = (path.read_text() for path in written[:3])
    assert "What the methods cost" in page
    assert "costs of coop, ViT-B-16, fp32" in page
    assert "## Complexity: ViT-B-16" in markdown
    assert r"\caption{Complexity: ViT-B-16" in latex
    assert r"\% of CLIP" in latex
    lines = list(csv.DictReader(StringIO(written[4].read_text())))
    assert [(line["method"], line["batch"], line["inference"], line["command"]) for line in lines] == [
        ("coop", "4", "12.3456", "maple efficiency"),
        ("coop", "100", "1353.2", "maple efficiency"),
    ]
    line = next(csv.DictReader(StringIO(written[3].read_text())))
    assert line["command"] == "maple train --method maple"
    assert (line["device"], line["versions"]) == ("cpu", "a=1")


def test_costs_alone_and_nothing_at_all(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no run in"):
        Report(tmp_path, METHODS)
    write(tmp_path, record("coop"))
    assert Report(tmp_path, METHODS).headline.startswith(
        "What 1 method costs: ViT-B-16, fp32, 50 classes, on a machine"
    )
    assert "What the methods cost" in Report(tmp_path, METHODS).text("html")
    assert len(read_costs(tmp_path / "complexity", [])) == 1, "the folder itself"


def test_shares_with_and_without_token_embeddings(tmp_path: Path) -> None:
    counts = {"parameters": 3_555_072, "backbone_parameters": 149_620_737, "embedding_parameters": 49408 * 512}
    write(tmp_path, record("maple", method={"name": "maple"}, **counts))
    section = Report(tmp_path, METHODS).tables[0].sections[0]
    assert section.columns[2:4] == ("% of CLIP", "% without token embeddings")
    assert [cell.text for cell in section.rows[0][1][:3]] == ["3,555,072", "2.38", "2.86"]
