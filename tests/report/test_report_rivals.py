"""With what classes are compared, and which evaluations are of a run's own data set."""

from pathlib import Path

from report_rows import METHODS, MakeRun

from maple.report import Report
from maple.report.comparison import class_baselines, class_changes, improved_classes


def test_classes_are_compared_with_zero_shot_and_cocoop(make_run: MakeRun, runs: Path) -> None:
    for method, base in (("zero_shot", 0.3), ("coop", 0.4), ("cocoop", 0.5), ("maple", 0.75)):
        make_run(method, base=base, novel=0.5)
    (group,) = Report(runs, METHODS).groups
    method = next(variant for variant in group.variants if variant.name == "maple")
    baselines = class_baselines(group, method)
    assert [baseline.name for baseline in baselines] == ["zero_shot", "cocoop"]
    changes, seeds = class_changes(group, method, baselines[1], "pets")
    assert ([change.difference for change in changes], seeds) == ([0.25, 0.25, 0, 0], 1)
    page = Report(runs, METHODS).text("html")
    assert "MaPLe against CoCoOp: of 4 classes 2 gain, 0 lose and 2 stay" in page
    assert "MaPLe against zero-shot CLIP: of 4 classes 2 gain" in page


def test_shares_of_improved_classes_are_in_the_order_of_zero_shot(make_run: MakeRun, runs: Path) -> None:
    for dataset, base, novel, ours in (("textures", 0.3, 0.2, 0.6), ("pets", 0.8, 0.7, 0.7), ("cars", 0.6, 0.5, 0.9)):
        make_run("zero_shot", dataset, base=base, novel=novel)
        make_run("maple", dataset, base=ours, novel=novel)
    (group,) = Report(runs, METHODS).groups
    method = next(variant for variant in group.variants if variant.name == "maple")
    assert group.zero_shot is not None
    shares = improved_classes(group, method, group.zero_shot)
    assert list(shares.items()) == [("pets", 0.0), ("cars", 0.5), ("textures", 0.5)]
    page = Report(runs, METHODS).text("html")
    assert "Classes that are more accurate with MaPLe than with zero-shot CLIP. Data sets are in the order" in page
    assert "Share of improved classes on 3 data sets" in page


def test_a_domain_is_its_runs_own_data_set(make_run: MakeRun, runs: Path) -> None:
    asked = "/data/pacs:photo"
    make_run(
        "maple", "pacs/photo", base=0.5, novel=0.5, source={"dataset": asked}, asked={"dataset": asked, "part": None}
    )
    (group,) = Report(runs, METHODS).groups
    assert group.key.kind == "base-to-novel"
