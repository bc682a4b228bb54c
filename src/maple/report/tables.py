"""The tables of a report: numbers with their spread, the best marked, published ones beside them."""

from dataclasses import dataclass, field, replace

from maple.report.ablations import Ablation, find_ablations, measure_of, measures
from maple.report.groups import ANY_SHOTS, MEASURES, Group, Spread
from maple.report.published import Published, published_for
from maple.report.statistics import FEWEST_PAIRS, Comparison, compare
from maple.report.variants import Variant

NOTHING = "–"


@dataclass(frozen=True)
class Cell:
    """What stands in one place: a text, with its deviation apart, and whether it is the best of its column."""

    text: str
    deviation: str = ""
    best: bool = False

    @property
    def plain(self) -> str:
        """Text and deviation."""
        return f"{self.text} ± {self.deviation}" if self.deviation else self.text


@dataclass(frozen=True)
class Section:
    """Rows under one heading, with their own columns; the first column is a row's label."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]


@dataclass(frozen=True)
class Table:
    """Sections under one caption, and what must be known to read them."""

    caption: str
    sections: tuple[Section, ...]
    notes: tuple[str, ...] = field(default=())


def make_tables(groups: list[Group]) -> list[Table]:
    """Each group's table, then its ablations, then its paired comparison where there are enough pairs."""
    tables = []
    for group in groups:
        tables.append(base_to_novel_table(group) if group.key.kind == "base-to-novel" else accuracy_table(group))
        tables += [_ablation_table(group, ablation) for ablation in find_ablations(group)]
        if comparisons := compare(group):
            tables.append(_comparison_table(group, comparisons))
    return tables


def base_to_novel_table(group: Group) -> Table:
    """Base, novel and harmonic mean: the averages over data sets first, then each data set."""
    notes = [
        "Top-1 accuracy in per cent. " + spread_note(group),
        "The harmonic mean of a data set is the mean of its seeds' harmonic means.",
    ]
    sections, cited = [], []
    if len(group.datasets) > 1:
        section, numbers = _average_section(group)
        sections.append(section)
        cited += numbers
        notes.append(
            "Averages: “HM of averages” is the harmonic mean of the average base and the average novel accuracy, as "
            "papers print it; “average of HMs” averages the data sets' own harmonic means."
        )
        notes += _incomplete_note(group)
    if any(_only_base(group, variant) for variant in group.variants):
        notes.append(
            f"{NOTHING} under Novel: not evaluated there; methods that learn weights for each class (probes, caches) "
            "say nothing about classes they were not trained on."
        )
    for dataset in group.datasets:
        section, numbers = _dataset_section(group, dataset)
        sections.append(section)
        cited += numbers
    return Table(group.key.caption, tuple(sections), (*notes, *_source_notes(cited)))


def _only_base(group: Group, variant: Variant) -> bool:
    base, novel = ([group.spread(variant, dataset, part) for dataset in group.datasets] for part in MEASURES[:2])
    return any(base) and not any(novel)


def _average_section(group: Group) -> tuple[Section, list[Published]]:
    spreads: dict[Variant, list[Spread | None]] = {
        variant: [
            *(group.average(variant, measure) for measure in MEASURES[:2]),
            group.harmonic_mean_of_averages(variant),
            group.average(variant, MEASURES[2]),
        ]
        for variant in group.variants
    }
    columns = ("Base", "Novel", "HM of averages", "average of HMs")
    return _section(f"Average over {len(group.datasets)} data sets", columns, spreads, group, None)


def _dataset_section(group: Group, dataset: str) -> tuple[Section, list[Published]]:
    spreads = {
        variant: [group.spread(variant, dataset, measure) for measure in MEASURES]
        for variant in group.variants
        if any(group.spread(variant, dataset, measure) for measure in MEASURES)
    }
    return _section(dataset, ("Base", "Novel", "Harmonic mean"), spreads, group, dataset)


def _section(
    title: str,
    columns: tuple[str, ...],
    spreads: dict[Variant, list[Spread | None]],
    group: Group,
    dataset: str | None,
) -> tuple[Section, list[Published]]:
    cells = mark_best({variant: [cell_of(spread) for spread in found] for variant, found in spreads.items()})
    published = {variant: published_for(group, variant, dataset) for variant in spreads}
    cited = [number for number in published.values() if number]
    if cited:
        columns = (*columns, *(f"published {measure}" for measure in ("base", "novel", "HM")))
    rows = []
    for variant, row in cells.items():
        row = [*row]
        if cited:
            row += [
                _published_cell(published[variant], measure, spread)
                for measure, spread in zip(MEASURES, spreads[variant], strict=False)
            ]
        rows.append((variant.label, (*row, Cell(_seed_count(spreads[variant])))))
    return Section(title, ("Method", *columns, "Seeds"), tuple(rows)), cited


def accuracy_table(group: Group) -> Table:
    """Top-1 accuracy: a row for each method, a column for each data set, and their average."""
    notes = [f"Top-1 accuracy in per cent. {spread_note(group)}"]
    several = len(group.datasets) > 1
    with_source = any(group.source_cells.values())
    spreads: dict[Variant, list[Spread | None]] = {}
    cited: dict[tuple[Variant, str | None], Published] = {}
    for variant in group.variants:
        row = [group.spread(variant, dataset) for dataset in group.datasets]
        if with_source:
            row.insert(0, Spread.of([found.row.top1 for found in group.source_cells.get(variant, {}).values()]))
        if several:
            row.append(group.average(variant))
        spreads[variant] = row
        for dataset in (*group.datasets, *([None] if several else [])):
            if number := published_for(group, variant, dataset):
                cited[variant, dataset] = number
    columns = [f"{group.key.source} (source)"] if with_source else []
    columns += [*group.datasets, *(["Average"] if several else [])]
    cells = mark_best({variant: [cell_of(spread) for spread in row] for variant, row in spreads.items()})
    rows = []
    for variant, marked in cells.items():
        rows.append((variant.label, (*marked, Cell(_seed_count(spreads[variant])))))
        published = [cited.get((variant, dataset)) for dataset in group.datasets]
        published += [cited.get((variant, None))] if several else []
        if any(published):
            found = spreads[variant][1:] if with_source else spreads[variant]
            line = [_published_cell(one, "top1", spread) for one, spread in zip(published, found, strict=True)]
            rows.append((f"{variant.label}, published", (*([Cell("")] if with_source else []), *line, Cell(""))))
    if several:
        which = "the data sets other than the source" if with_source else "the data sets"
        notes.append(f"The average is over {which}.")
        notes += _incomplete_note(group)
    section = Section("", ("Method", *columns, "Seeds"), tuple(rows))
    return Table(group.key.caption, (section,), (*notes, *_source_notes(list(cited.values()))))


def _ablation_table(group: Group, ablation: Ablation) -> Table:
    titles = {"base": "Base", "novel": "Novel", "harmonic mean": "Harmonic mean", "top1": "Accuracy"}
    shown = measures(group)
    sections = []
    for series in ablation.series:
        found = {variant: [measure_of(group, variant, measure) for measure in shown] for _, variant in series.points}
        cells = mark_best({variant: [cell_of(spread) for spread in spreads] for variant, spreads in found.items()})
        rows = tuple(
            (value or "(empty)", (*cells[variant], Cell(_seed_count(found[variant]))))
            for value, variant in series.points
        )
        columns = (ablation.setting, *(titles[measure] for measure in shown), "Seeds")
        sections.append(Section(series.others, columns, rows))
    several = len(group.datasets) > 1
    hm = " The harmonic mean is that of the averages." if several and len(shown) > 1 else ""
    over = f"averages over {len(group.datasets)} data sets." if several else f"on {group.datasets[0]}."
    notes = (f"Top-1 accuracy in per cent, {over}{hm} All other settings are equal. {spread_note(group)}",)
    return Table(f"Ablation of {ablation.setting}: {ablation.method}, {group.key.conditions}", tuple(sections), notes)


def _comparison_table(group: Group, comparisons: list[Comparison]) -> Table:
    measures = list(comparisons[0].differences)
    titles = {"base": "Base", "novel": "Novel", "harmonic mean": "Harmonic mean", "top1": "Accuracy"}
    rows = tuple(
        (
            f"{comparison.method} − {comparison.baseline}",
            (
                *(Cell(signed(100 * comparison.differences[measure])) for measure in measures),
                Cell(f"{comparison.wins} of {comparison.pairs}" + _ties(comparison.ties)),
                Cell(NOTHING if comparison.p is None else _p_value(comparison.p)),
            ),
        )
        for comparison in comparisons
    )
    decided = titles[measures[-1]].lower()
    notes = [
        "Mean differences in percentage points over pairs of the same seed and data set (where there are at least "
        f"{FEWEST_PAIRS}); p: Wilcoxon's signed-rank test on the {decided}, two-sided, not corrected for the number of "
        "comparisons. Seeds of one data set are not independent, so p is rather too small than too large."
    ]
    if any(comparison.p is None for comparison in comparisons):
        notes.append("p needs scipy: pip install 'maple-clip[report]'.")
    columns = ("Comparison", *(titles[measure] for measure in measures), "Higher in", "p")
    return Table(f"Paired comparison, {group.key.conditions}", (Section("", columns, rows),), tuple(notes))


def percent(fraction: float) -> str:
    """Two decimals."""
    return f"{100 * fraction:.2f}"


def signed(points: float) -> str:
    """Two decimals and a sign; a true minus, no minus zero."""
    text = f"{points:+.2f}"
    return "0.00" if float(text) == 0 else text.replace("-", "−")


def spread_note(*groups: Group) -> str:
    """What the spread is over, in words."""
    counts = {
        len(cell)
        for group in groups
        for (variant, _, _), cell in group.cells.items()
        if len(group.variants) == 1 or variant.name != "zero_shot"
    }
    if counts <= {1}:
        return "One seed, so there is no spread."
    same = f"{min(counts)} seeds" if len(counts) == 1 else f"{min(counts)} to {max(counts)} seeds"
    shots = " Zero-shot CLIP has no shots." if groups[0].key.shots == ANY_SHOTS else ""
    return f"Mean ± sample standard deviation over {same}.{shots}"


def cell_of(spread: Spread | None) -> Cell:
    """Mean and deviation in per cent."""
    if spread is None:
        return Cell(NOTHING)
    return Cell(percent(spread.mean), "" if spread.deviation is None else percent(spread.deviation))


def mark_best(rows: dict[Variant, list[Cell]]) -> dict[Variant, list[Cell]]:
    """The highest of each column, and those equal to it as printed; of a single number none is the best."""
    marked = {variant: list(row) for variant, row in rows.items()}
    for column in range(max((len(row) for row in rows.values()), default=0)):
        numbers = {variant: float(row[column].text) for variant, row in rows.items() if row[column].text != NOTHING}
        if len(numbers) < 2:
            continue
        for variant, number in numbers.items():
            if number == max(numbers.values()):
                marked[variant][column] = replace(marked[variant][column], best=True)
    return marked


def _published_cell(number: Published | None, measure: str, ours: Spread | None) -> Cell:
    if number is None or measure not in number.values:
        return Cell(NOTHING)
    value = number.values[measure]
    return Cell(f"{value:.2f}" if ours is None else f"{value:.2f} ({signed(100 * ours.mean - value)})")


def _seed_count(spreads: list[Spread | None]) -> str:
    counts = sorted({spread.n for spread in spreads if spread})
    return NOTHING if not counts else "–".join(str(count) for count in sorted({counts[0], counts[-1]}))


def _incomplete_note(group: Group) -> list[str]:
    parts = MEASURES[:2] if group.key.kind == "base-to-novel" else ("top1",)
    told = []
    for variant in group.variants:
        missing = [
            dataset for dataset in group.datasets if not all(group.values(variant, dataset, part) for part in parts)
        ]
        if missing:
            told.append(f"{variant.label} lacks {', '.join(missing)}")
    return [f"No average where a data set is missing: {'; '.join(told)}."] if told else []


def _source_notes(cited: list[Published]) -> list[str]:
    if not cited:
        return []
    places = "; ".join(sorted({number.read_in for number in cited}))
    return [f"Published numbers with our difference in parentheses; 16 shots, ViT-B/16 of OpenAI. Read in: {places}."]


def _ties(ties: int) -> str:
    return f", {ties} equal" if ties else ""


def _p_value(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"
