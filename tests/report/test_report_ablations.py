"""Ablations: which runs make one, and its numbers, against ones computed by hand."""

from pathlib import Path
from typing import Any

from report_rows import METHODS, MakeRun

from maple.report import Report
from maple.report.series import find_ablations
from maple.report.tables import Table


def make_depths(make_run: MakeRun, depths: dict[int, float], dataset: str = "pets", **settings: Any) -> None:
    for depth, base in depths.items():
        for seed in (1, 2):
            both = {"prompt_depth": depth, **settings}
            folder = f"{dataset}-{depth}-{seed}-{'-'.join(map(str, settings.values()))}"
            make_run("maple", dataset, seed, base=base + 0.1 * seed, novel=0.5, folder=folder, settings=both)


def ablation_tables(runs: Path) -> list[Table]:
    return [table for table in Report(runs, METHODS).tables if table.caption.startswith("Ablation")]


def test_numbers_in_their_order(make_run: MakeRun, runs: Path) -> None:
    make_depths(make_run, {12: 0.1, 9: 0.3, 1: 0.2})
    make_run("zero_shot", base=0.9, novel=0.9)
    (table,) = ablation_tables(runs)
    assert table.caption == "Ablation of prompt_depth: MaPLe, tiny, 16 shots"
    (section,) = table.sections
    assert section.columns == ("prompt_depth", "Base", "Novel", "Harmonic mean", "Seeds")
    found = {label: [cell.plain for cell in cells] for label, cells in section.rows}
    # Base of depth 1: .3 and .4; harmonic means 2 * .15 / .8 and 2 * .2 / .9.
    assert found["1"] == ["35.00 ± 7.07", "50.00 ± 0.00", "40.97 ± 4.91", "2"]
    assert [label for label, _ in section.rows] == ["1", "9", "12"], "not as text, which puts 12 before 9"
    assert [cells[0].best for _, cells in section.rows] == [False, True, False]
    assert "All other settings are equal" in table.notes[0]


def test_two_numbers_or_two_differences_make_none(make_run: MakeRun, runs: Path) -> None:
    make_depths(make_run, {1: 0.1, 9: 0.2})
    make_depths(make_run, {12: 0.3}, prompt_length=4)
    assert ablation_tables(runs) == []


def test_words_and_several_settings(make_run: MakeRun, runs: Path) -> None:
    for sharing in ("per_layer", "unified"):
        make_depths(make_run, {1: 0.1, 2: 0.2, 3: 0.3}, coupling_sharing=sharing)
    (group,) = Report(runs, METHODS).groups
    depth, sharing_ablation = sorted(find_ablations(group), key=lambda found: not found.numeric)
    assert (depth.setting, depth.numeric, depth.values) == ("prompt_depth", True, ("1", "2", "3"))
    assert [series.others for series in depth.series] == ["coupling_sharing=per_layer", "coupling_sharing=unified"]
    assert (sharing_ablation.setting, sharing_ablation.numeric) == ("coupling_sharing", False)
    assert [series.others for series in sharing_ablation.series] == [f"prompt_depth={depth}" for depth in (1, 2, 3)]


def test_several_data_sets_are_averaged(make_run: MakeRun, runs: Path) -> None:
    for dataset, start in (("pets", 0.1), ("cars", 0.3)):
        make_depths(make_run, dict.fromkeys((1, 2, 3), start), dataset)
    (table,) = ablation_tables(runs)
    base = {cells[0].plain for _, cells in table.sections[0].rows}
    assert base == {"35.00 ± 7.07"}  # seeds' own averages: .3 and .4
    assert "averages over 2 data sets. The harmonic mean is that of the averages." in table.notes[0]


def test_the_page_draws_it(make_run: MakeRun, runs: Path) -> None:
    make_depths(make_run, {1: 0.1, 9: 0.2, 12: 0.3})
    for direction in ("text_to_vision", "vision_to_text"):
        make_depths(make_run, {1: 0.25}, coupling_direction=direction)
    make_run("zero_shot", base=0.9, novel=0.9)
    page = Report(runs, METHODS).text("html")
    assert "MaPLe at several values of prompt_depth" in page
    assert 'aria-label="MaPLe at 3 values of prompt_depth"' in page
    assert 'aria-label="MaPLe at 2 values of coupling_direction"' in page
    assert "Ablation of prompt\\_depth: MaPLe" in Report(runs, METHODS).text("markdown")
    assert r"Ablation of prompt\_depth: MaPLe" in Report(runs, METHODS).text("latex")


def test_lengths_that_start_at_words_and_at_random_are_told_apart(make_run: MakeRun, runs: Path) -> None:
    for length in (1, 2, 4, 8):
        settings = {"prompt_length": length, "init_text": "a photo of a"}
        make_run("maple", base=0.1 * length, novel=0.5, folder=f"length{length}", settings=settings)
    (table,) = ablation_tables(runs)
    assert "Prompts of up to four tokens start at the words of init_text" in table.notes[-1]


def test_lengths_that_all_start_alike_need_no_note(make_run: MakeRun, runs: Path) -> None:
    for length in (1, 2, 4):
        settings = {"prompt_length": length, "init_text": "a photo of a"}
        make_run("maple", base=0.1 * length, novel=0.5, folder=f"length{length}", settings=settings)
    (table,) = ablation_tables(runs)
    assert not any("init_text" in note for note in table.notes)
