"""Accuracy against shots as tables: a row for each method, a column for each number of shots."""

from maple.report.groups import MEASURES
from maple.report.shots import ShotCurves
from maple.report.tables import Section, Table, cell_of, mark_best, spread_note


def shots_tables(curves: ShotCurves) -> list[Table]:
    """The mean over the data sets, where there are several, then each data set."""
    novel = curves.key.kind == "base-to-novel"
    what = "Harmonic mean of base and novel accuracy" if novel else "Top-1 accuracy"
    notes = [f"{what} in per cent at each number of training images per class. {spread_note(*curves.groups.values())}"]
    if curves.zero_shot():
        notes.append("Zero-shot CLIP sees no training images; it stands in every column.")
    each = tuple(_section(curves, dataset, dataset) for dataset in curves.datasets)
    if len(each) == 1:
        return [Table(curves.caption, each, tuple(notes))]
    mean = _section(curves, None, f"Mean over {len(each)} data sets")
    over = f"The mean is the {MEASURES[2]} of the averages. " if novel else ""
    return [
        Table(curves.caption, (mean,), (*notes, f"{over}No mean where a data set is missing.")),
        Table(f"{curves.caption}, each data set", each, tuple(notes)),
    ]


def _section(curves: ShotCurves, dataset: str | None, title: str) -> Section:
    measure = curves.measures[-1]
    cells = mark_best(
        {
            variant: [cell_of(curves.spread(variant, shots, dataset, measure)) for shots in curves.shots]
            for variant in curves.variants
        }
    )
    columns = [f"{shots} shot{'s' if shots > 1 else ''}" for shots in curves.shots]
    rows = tuple((variant.label, tuple(row)) for variant, row in cells.items())
    return Section(title, ("Method", *columns), rows)
