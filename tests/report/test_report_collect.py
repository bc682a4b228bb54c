"""Finding runs, and what becomes of damaged ones."""

import json
from pathlib import Path

import pytest
from report_rows import METHODS, MakeRun, row

from maple.errors import DataError
from maple.report import Report, collect


def test_runs_are_found_at_any_depth(make_run: MakeRun, runs: Path) -> None:
    make_run("maple", base=0.5, novel=0.5, folder="b/deep/run")
    make_run("coop", base=0.5, folder="a")
    found = collect(runs, METHODS)
    assert [run.name for run in found.runs] == ["a", "b/deep/run"]
    assert len(found.evaluations) == 3
    assert [run.name for run in collect(runs / "a", METHODS).runs] == ["."]


def test_a_damaged_line_costs_only_itself(make_run: MakeRun, runs: Path) -> None:
    run = make_run("maple", base=0.5, novel=0.6)
    lines = (run / "rows.jsonl").read_text()
    wrong = json.loads(lines.splitlines()[0]) | {"top1": 1.5}
    (run / "rows.jsonl").write_text(f'{{"cut\n{json.dumps(wrong)}\n[1]\n{lines}')
    found = collect(runs, METHODS)
    assert [one.row.top1 for one in found.evaluations] == [0.5, 0.6]
    places = [problem.place for problem in found.problems]
    assert places == [f"pets_maple_1/rows.jsonl line {number}" for number in (1, 3, 2)]
    assert "top1: Input should be less than or equal to 1" in found.problems[2].reason


def test_a_damaged_folder_is_named(make_run: MakeRun, runs: Path) -> None:
    make_run("maple", base=0.5)
    broken = make_run("coop", base=0.5)
    (broken / "config.json").write_text("{")
    found = collect(runs, METHODS)
    assert [run.name for run in found.runs] == ["pets_maple_1"]
    assert found.problems[0].place == "pets_coop_1/config.json"


def test_runs_without_evaluation_are_listed_with_the_reason(make_run: MakeRun, runs: Path) -> None:
    make_run("maple", base=0.5)
    make_run("coop", seed=2)
    interrupted = make_run("coop", seed=3)
    (interrupted / "prompts.safetensors").unlink()
    reasons = {problem.place: problem.reason for problem in collect(runs, METHODS).without_evaluation}
    assert reasons["pets_coop_2"].startswith("finished, but not evaluated: maple evaluate ")
    assert reasons["pets_coop_3"] == "not finished: 2 of 2 epochs; repeat its command to continue"


def test_failed_runs_of_a_sweep_are_listed_with_their_error(make_run: MakeRun, runs: Path) -> None:
    make_run("zero_shot", base=0.5)
    begun = make_run("maple")
    for folder, content in ((begun, '{"error": "diverged"}'), (runs / "early", '{"error": "too deep"}')):
        folder.mkdir(exist_ok=True)
        (folder / "failure.json").write_text(content)
    (runs / "odd").mkdir()
    (runs / "odd" / "failure.json").write_text("{")
    reasons = {problem.place: problem.reason for problem in collect(runs, METHODS).without_evaluation}
    assert reasons.pop("odd").startswith("failed: failure.json is unreadable")
    assert reasons == {begun.name: "failed: diverged", "early": "failed: too deep"}


def test_a_run_that_failed_after_an_evaluation_is_listed(make_run: MakeRun, runs: Path) -> None:
    make_run("linear_probe", base=0.9)
    begun = make_run("maple", base=0.5)
    (begun / "failure.json").write_text('{"error": "out of memory"}')
    report = Report(runs, METHODS)
    (problem,) = report.collection.problems
    assert (problem.place, problem.reason) == (begun.name, "failed before its other evaluations: out of memory")
    (table,) = report.tables
    assert "– under Novel: runs of MaPLe failed before they were evaluated there." in table.notes
    (begun.parent / "pets_linear_probe_1" / "rows.jsonl").unlink()
    (table,) = Report(runs, METHODS).tables
    assert not any("cannot predict" in note for note in table.notes)


def test_nothing_to_report(make_run: MakeRun, runs: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere is not a folder"):
        collect(tmp_path / "nowhere", METHODS)
    with pytest.raises(DataError, match="there is no run in"):
        collect(tmp_path, METHODS)
    make_run("maple")
    with pytest.raises(DataError, match=r"no run in .* has a readable evaluation .*pets_maple_1: finished, but not"):
        collect(runs, METHODS)


def test_the_same_evaluation_counts_once(make_run: MakeRun, runs: Path) -> None:
    make_run("maple", base=0.5, folder="a")
    make_run("maple", base=0.6, folder="b")
    found = collect(runs, METHODS)
    assert [one.row.top1 for one in found.evaluations] == [0.5]
    assert found.problems[0].place == "b, pets base"
    assert "60.00 % here, 50.00 % there" in found.problems[0].reason


def test_of_one_run_the_last_evaluation_counts(make_run: MakeRun, runs: Path) -> None:
    """Earlier versions kept the row from before images were added."""
    rows = [row("maple", "pets", 1, "base", top1, ["a", "b"], items=items) for top1, items in ((0.2, "a"), (0.6, "b"))]
    make_run("maple", rows=rows)
    make_run("maple", folder="again", rows=[row("maple", "pets", 1, "base", 0.5, ["a", "b"], items="c")])
    collection = collect(runs, METHODS)
    assert [evaluation.row.top1 for evaluation in collection.evaluations] == [0.5]
    reasons = [problem.reason for problem in collection.problems]
    assert reasons == [
        "on other images than a later evaluation of this run (20.00 %); left out",
        "again holds the same evaluation, on other images of this data set: the settings and the seed are equal "
        "(60.00 % here, 50.00 % there); left out",
    ]


def test_lists_of_other_data_sets_by_the_rule_of_an_earlier_version_are_left_out(make_run: MakeRun, runs: Path) -> None:
    source = {"dataset": "imagenet", "classes": "all"}
    for seed, rule in ((1, {}), (2, {"target_rule": "none"})):
        rows = [
            row("mmrl", dataset, seed, "all", 0.5, ["a", "b"], source=source, **changes)
            for dataset, changes in (("imagenet", {}), ("pets", rule))
        ]
        make_run("mmrl", "imagenet", seed, rows=rows)
    collection = collect(runs, METHODS)
    assert [(each.row.dataset, each.row.seed) for each in collection.evaluations] == [
        *(("imagenet", 1), ("imagenet", 2), ("pets", 2))
    ]
    (problem,) = collection.problems
    assert "predicted the names that were trained by another rule" in problem.reason


def test_other_data_sets_with_the_sentences_of_the_own_one_are_left_out(make_run: MakeRun, runs: Path) -> None:
    own = {"templates": ["a photo of a {}, a type of food."]}
    for seed, given in ((1, {}), (2, {"sentences": own})):
        rows = [
            row("zero_shot", name, seed, "all", 0.5, ["one", "two"], source={"dataset": "pets"}, is_own=name == "pets")
            | (given if name == "food" else {})
            for name in ("pets", "food", "scenes")
        ]
        make_run("zero_shot", seed=seed, rows=rows)
    found = collect(runs, METHODS)
    left = [(evaluation.row.dataset, evaluation.row.seed) for evaluation in found.evaluations]
    assert left == [("pets", 1), ("scenes", 1), ("pets", 2), ("food", 2), ("scenes", 2)]
    assert found.problems[0].place == "pets_zero_shot_1, food all"
    assert found.problems[0].reason.endswith("with the sentences of pets; evaluate it again")


@pytest.mark.parametrize(
    ("asked", "dataset", "own"),
    [
        ("pets", "pets", True),
        ("pets", "cars", False),
        ("/data/pets", "pets", True),
        ("/data/pets", "cars", False),
        ("emoji-food", "emoji-food/twemoji", True),
        ("emoji-food", "emoji-food/lineart", False),
        ("emoji-food/noto", "emoji-food/lineart", False),
    ],
)
def test_the_own_data_set_is_known(asked: str, dataset: str, own: bool, make_run: MakeRun, runs: Path) -> None:
    one = row("maple", dataset, 1, "all", 0.5, ["x"], source={"dataset": asked})
    run = make_run("maple", "any", rows=[one])
    (run / "items.json").write_text(json.dumps({"items": [{"path": "twemoji/1f347/8"}]}))
    assert [found.on_own_data for found in collect(runs, METHODS).evaluations] == [own]


@pytest.mark.parametrize(
    ("trained", "asked", "own"),
    [("/site_a/images", "/site_b/images", False), ("/site_a/images", "/site_a/images", True)],
)
def test_a_row_says_whether_it_is_on_its_own_data_set(
    trained: str, asked: str, own: bool, make_run: MakeRun, runs: Path
) -> None:
    """A folder elsewhere may have the name of the one that was trained on."""
    asked_for = {"dataset": asked}
    make_run(
        "maple",
        rows=[row("maple", "images", 1, "all", 0.5, ["x"], source={"dataset": trained}, asked=asked_for, is_own=own)],
    )
    assert [found.on_own_data for found in collect(runs, METHODS).evaluations] == [own]


def test_predictions_outside_the_run_are_refused(make_run: MakeRun, runs: Path) -> None:
    good = row("maple", "pets", 1, "all", 0.5, ["x"])
    make_run("maple", rows=[good, {**good, "classes": "base", "predictions": "../../secret.npz"}])
    found = collect(runs, METHODS)
    assert len(found.evaluations) == 1
    assert "must be inside the run" in found.problems[0].reason


@pytest.mark.parametrize("section", ["train", "data", "backbone"])
def test_settings_of_an_odd_shape_cost_their_run_alone(section: str, make_run: MakeRun, runs: Path) -> None:
    make_run("maple", base=0.5)
    broken = make_run("coop", base=0.5)
    settings = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**settings, section: [1]}))
    found = collect(runs, METHODS)
    assert [run.name for run in found.runs] == ["pets_maple_1"]
    assert found.problems[0].reason == f"damaged: {section} must be an object"


@pytest.mark.parametrize("wrong", [{"logs": {"accuracy": "x"}}, {"losses": ["x"]}, {"loss": "x"}])
def test_an_epoch_of_an_odd_shape_is_left_out_and_said(wrong: dict[str, object], make_run: MakeRun, runs: Path) -> None:
    metrics = make_run("maple", base=0.5) / "metrics.jsonl"
    first, second = map(json.loads, metrics.read_text().splitlines())
    metrics.write_text(f"{json.dumps({**first, **wrong})}\n{json.dumps(second)}\n")
    found = collect(runs, METHODS)
    assert [epoch["epoch"] for epoch in found.runs[0].history] == [1]
    assert found.problems[0].place == "pets_maple_1/metrics.jsonl line 1"
