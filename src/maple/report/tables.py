"""The tables of a report: accuracies with their spread, ablations, paired tests, and what the methods cost."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from maple.descriptions import MethodDescription
from maple.metrics import harmonic_mean
from maple.plugins import code_title
from maple.report.comparison import FEWEST_PAIRS, PairedTest, paired_tests
from maple.report.groups import ANY_SHOTS, BASE, HARMONIC_MEAN, MEAN_OF_HARMONIC_MEANS, MEASURES, Group, Spread, Variant
from maple.report.published import PublishedResult, differences_from_papers, published_costs, published_result
from maple.report.records import CostRow
from maple.report.series import Ablation, ShotCurves, find_ablations

NOTHING = "–"
_LONGEST_WORD_PROMPT = 4  # tokens of a prompt that starts at words
MEASURE_TITLES = {"base": "Base", "novel": "Novel", "harmonic mean": "Harmonic mean", "top1": "Accuracy"}

RowKey = TypeVar("RowKey")


@dataclass(frozen=True)
class Cell:
    """One place of a table: a text, its deviation apart, and whether it is the best of its column."""

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
    """Sections under one caption, and the notes that explain them.

    Example:
        >>> table = Report(Path("runs"), describe_methods()).tables[0]
        >>> [(label, [cell.plain for cell in cells]) for label, cells in table.sections[0].rows]
    """

    caption: str
    sections: tuple[Section, ...]
    notes: tuple[str, ...] = field(default=())


def group_tables(group: Group) -> list[Table]:
    """A group's table, then its ablations, then its paired tests where there are enough pairs."""
    tables = [_base_to_novel_table(group) if group.key.kind == "base-to-novel" else _accuracy_table(group)]
    tables += [_ablation_table(group, ablation) for ablation in find_ablations(group)]
    if tests := paired_tests(group):
        tables.append(_paired_tests_table(group, tests))
    return tables


def shots_tables(curves: ShotCurves) -> list[Table]:
    """Accuracy against shots, a column for each: the mean over the data sets, where there are several, then each."""
    measure = curves.measures[-1]
    is_harmonic = measure == HARMONIC_MEAN
    quantity = "Harmonic mean of base and novel accuracy" if is_harmonic else "Top-1 accuracy"
    notes = [
        f"{quantity} in per cent at each number of training images per class. {_spread_note(*curves.groups.values())}"
    ]
    if curves.zero_shot:
        notes.append("Zero-shot CLIP sees no training images; it is shown in every column.")

    def section(title: str, dataset: str | None = None) -> Section:
        spreads = {
            variant.label: list(curves.spreads(variant, measure, dataset).values()) for variant in curves.variants
        }
        columns = [f"{shots} shot{'s' if shots > 1 else ''}" for shots in curves.groups]
        return Section(title, ("Method", *columns), tuple((key, tuple(row)) for key, row in _cells(spreads).items()))

    each = tuple(section(dataset, dataset) for dataset in curves.datasets)
    if len(each) == 1:
        return [Table(curves.caption, each, tuple(notes))]
    over = "The mean is the harmonic mean of the averages. " if is_harmonic else ""
    mean_notes = (*notes, f"{over}No mean where a data set is missing.")
    return [
        Table(curves.caption, (section(f"Mean over {len(each)} data sets"),), mean_notes),
        Table(f"{curves.caption}, each data set", each, tuple(notes)),
    ]


def _base_to_novel_table(group: Group) -> Table:
    """Base, novel and harmonic mean: the averages over data sets first, then each data set."""
    several = len(group.datasets) > 1
    notes = [
        f"Top-1 accuracy in per cent. {_spread_note(group)}",
        "The harmonic mean of a data set is the mean of its seeds' harmonic means.",
    ]
    if several:
        notes.append(
            "Averages: “HM of averages” is the harmonic mean of the average base and the average novel accuracy, as "
            "papers print it; “average of HMs” averages the data sets' own harmonic means."
        )
        notes += _incomplete_note(group)
    notes += _novel_notes(group)
    sections, cited = [], []
    for dataset in (*([None] if several else []), *group.datasets):
        title, measures = dataset, list(MEASURES)
        columns: tuple[str, ...] = ("Base", "Novel", "Harmonic mean")
        if dataset is None:
            title, measures = f"Average over {len(group.datasets)} data sets", [*MEASURES, MEAN_OF_HARMONIC_MEANS]
            columns = ("Base", "Novel", "HM of averages", "average of HMs")
        spreads = {
            variant: [group.spread(variant, measure, dataset) for measure in measures] for variant in group.variants
        }
        spreads = {variant: row for variant, row in spreads.items() if dataset is None or any(row)}
        published = {variant: published_result(group, variant, dataset) for variant in spreads}
        reruns = {variant: published_result(group, variant, dataset, rerun=True) for variant in spreads}
        here = [result for result in (*published.values(), *reruns.values()) if result]
        cited += here
        if here:
            columns += ("published base", "published novel", "published HM")
        rows = []
        for variant, cells in _cells(spreads).items():
            row = spreads[variant]
            base, novel = (spread.mean if spread else None for spread in row[:2])
            # As papers compute theirs; ours is the mean over the seeds.
            means = (base, novel, None if base is None or novel is None else harmonic_mean(base, novel))
            compared = list(zip(MEASURES, means, strict=True))
            cells += [_published_cell(published[variant], *pair) for pair in compared] if here else []
            rows.append((variant.label, (*cells, _seeds(row))))
            if rerun := reruns[variant]:
                line = [_published_cell(rerun, *pair) for pair in compared]
                ours = [Cell("")] * (len(cells) - len(line))
                rows.append((f"{variant.label}, independent re-run", (*ours, *line, Cell(""))))
        sections.append(Section(str(title), ("Method", *columns, "Seeds"), tuple(rows)))
    return Table(group.key.caption, tuple(sections), (*notes, *_published_notes(cited, group)))


def _novel_notes(group: Group) -> list[str]:
    """Why methods were evaluated on base classes alone."""
    failed: list[str] = []
    others: list[str] = []
    for variant in group.variants:
        cells = [(part, cell) for (other, _, part), cell in group.cells.items() if other == variant]
        if {part for part, _ in cells} == {BASE}:
            has_failed = any(evaluation.run.failure for _, cell in cells for evaluation in cell.values())
            (failed if has_failed else others).append(variant.label)
    notes = []
    if others:
        notes.append(
            f"{NOTHING} under Novel: not evaluated there; methods that learn weights for each class (probes, caches) "
            "cannot predict classes they were not trained on."
        )
    if failed:
        notes.append(f"{NOTHING} under Novel: runs of {', '.join(failed)} failed before they were evaluated there.")
    return notes


def _accuracy_table(group: Group) -> Table:
    """Top-1 accuracy: a row for each method, a column for each data set, and their average."""
    several = len(group.datasets) > 1
    with_source = any(group.source_cells.values())
    datasets = (*group.datasets, *([None] if several else []))
    spreads: dict[Variant, list[Spread | None]] = {}
    for variant in group.variants:
        spreads[variant] = [group.spread(variant, "top1", dataset) for dataset in datasets]
        if with_source:
            on_source = group.source_cells.get(variant, {}).values()
            spreads[variant].insert(0, Spread.of(evaluation.row.top1 for evaluation in on_source))
    rows, cited = [], []
    for variant, cells in _cells(spreads).items():
        rows.append((variant.label, (*cells, _seeds(spreads[variant]))))
        columns_of = (*([group.key.source] if with_source else []), *datasets)
        published = [published_result(group, variant, dataset) for dataset in columns_of]
        cited += [result for result in published if result]
        if any(published):
            ours = [spread.mean if spread else None for spread in spreads[variant]]
            line = [_published_cell(result, "top1", mean) for result, mean in zip(published, ours, strict=True)]
            rows.append((f"{variant.label}, published", (*line, Cell(""))))
    notes = [f"Top-1 accuracy in per cent. {_spread_note(group)}"]
    if several:
        which = "the data sets other than the source" if with_source else "the data sets"
        notes += [f"The average is over {which}.", *_incomplete_note(group)]
    source = [f"{group.key.source} (source)"] if with_source else []
    columns = ("Method", *source, *(dataset or "Average" for dataset in datasets), "Seeds")
    return Table(group.key.caption, (Section("", columns, tuple(rows)),), (*notes, *_published_notes(cited, group)))


def _ablation_table(group: Group, ablation: Ablation) -> Table:
    titles = [MEASURE_TITLES[measure] for measure in group.measures]
    sections = []
    for series in ablation.series:
        spreads = {
            value: [group.spread(variant, measure) for measure in group.measures] for value, variant in series.points
        }
        rows = [(value or "(empty)", (*cells, _seeds(spreads[value]))) for value, cells in _cells(spreads).items()]
        sections.append(Section(series.others, (ablation.setting, *titles, "Seeds"), tuple(rows)))
    several = len(group.datasets) > 1
    over = f"averages over {len(group.datasets)} data sets." if several else f"on {group.datasets[0]}."
    hm = " The harmonic mean is that of the averages." if several and HARMONIC_MEAN in group.measures else ""
    notes = [f"Top-1 accuracy in per cent, {over}{hm} All other settings are equal. {_spread_note(group)}"]
    shown = {variant for series in ablation.series for _, variant in series.points}
    records = [record for (variant, _, _), cell in group.cells.items() if variant in shown for record in cell.values()]
    if ablation.setting.endswith("prompt_length") and any(record.row.method.get("init_text") for record in records):
        lengths = [float(value) for value in ablation.values]
        if min(lengths) <= _LONGEST_WORD_PROMPT < max(lengths):
            notes.append(
                "Prompts of up to four tokens start at the words of init_text, longer ones at random, as published: "
                "between these, length and start change together."
            )
    return Table(
        f"Ablation of {ablation.setting}: {ablation.method}, {group.key.conditions}", tuple(sections), tuple(notes)
    )


def _paired_tests_table(group: Group, tests: list[PairedTest]) -> Table:
    rows = []
    for test in tests:
        differences = [Cell(_signed(100 * test.differences[measure])) for measure in group.measures]
        wins = f"{test.wins} of {test.pairs}" + (f", {test.ties} equal" if test.ties else "")
        p = "< 0.001" if test.p < 0.001 else f"{test.p:.3f}"
        rows.append((f"{test.method} − {test.baseline}", (*differences, Cell(wins), Cell(p))))
    titles = [MEASURE_TITLES[measure] for measure in group.measures]
    note = (
        "Mean differences in percentage points over pairs of the same seed and data set (where there are at least "
        f"{FEWEST_PAIRS}); p: Wilcoxon's signed-rank test on the {titles[-1].lower()}, two-sided, not corrected for "
        "the number of comparisons. Seeds of one data set are not independent, so p is rather too small than too large."
    )
    section = Section("", ("Comparison", *titles, "Higher in", "p"), tuple(rows))
    return Table(f"Paired comparison, {group.key.conditions}", (section,), (note,))


def _signed(points: float) -> str:
    """Two decimals and a sign; a true minus, no minus zero."""
    text = f"{points:+.2f}"
    return "0.00" if float(text) == 0 else text.replace("-", "−")


def _cells(spreads: Mapping[RowKey, Sequence[Spread | None]]) -> dict[RowKey, list[Cell]]:
    """Mean and deviation in per cent. The highest of a column is marked, with those equal to it as printed."""
    best = []
    for column in zip(*spreads.values(), strict=True):
        means = [100 * spread.mean for spread in column if spread]
        best.append(f"{max(means):.2f}" if len(means) > 1 else None)
    cells: dict[RowKey, list[Cell]] = {}
    for key, row in spreads.items():
        cells[key] = []
        for spread, highest in zip(row, best, strict=True):
            text = f"{100 * spread.mean:.2f}" if spread else NOTHING
            deviation = "" if spread is None or spread.deviation is None else f"{100 * spread.deviation:.2f}"
            cells[key].append(Cell(text, deviation, text == highest))
    return cells


def _spread_note(*groups: Group) -> str:
    """How many seeds the spread is over."""
    cells = [(group, variant, cell) for group in groups for (variant, _, _), cell in group.cells.items()]
    cells += [(group, variant, cell) for group in groups for variant, cell in group.source_cells.items()]
    counts = {len(cell) for group, variant, cell in cells if len(group.variants) == 1 or not variant.is_zero_shot}
    if counts <= {1}:
        return "One seed, so there is no spread."
    seeds = f"{min(counts)} seeds" if len(counts) == 1 else f"{min(counts)} to {max(counts)} seeds"
    shots = " Zero-shot CLIP has no shots." if groups[0].key.shots == ANY_SHOTS else ""
    return f"Mean ± sample standard deviation over {seeds}.{shots}"


def _seeds(spreads: Iterable[Spread | None]) -> Cell:
    counts = sorted({spread.n for spread in spreads if spread})
    return Cell(NOTHING if not counts else "–".join(str(count) for count in sorted({counts[0], counts[-1]})))


def _incomplete_note(group: Group) -> list[str]:
    measures = group.measures[: len(group.parts)]  # without the harmonic mean
    notes = []
    for variant in group.variants:
        complete = {name: all(group.values(variant, part, name) for part in measures) for name in group.datasets}
        if missing := [dataset for dataset in group.datasets if not complete[dataset]]:
            notes.append(f"{variant.label} lacks {', '.join(missing)}")
    return [f"No average where a data set is missing: {'; '.join(notes)}."] if notes else []


def _published_cell(result: PublishedResult | None, measure: str, ours: float | None) -> Cell:
    if result is None or measure not in result.values:
        return Cell(NOTHING)
    value = result.values[measure]
    return Cell(f"{value:.2f}" if ours is None else f"{value:.2f} ({_signed(100 * ours - value)})")


def _published_notes(cited: Sequence[PublishedResult], group: Group) -> list[str]:
    notes = []
    if cited:
        read_in = "; ".join(sorted({result.read_in for result in cited}))
        note = "Published numbers with our difference in parentheses; 16 shots, ViT-B/16 of OpenAI."
        if group.key.kind == "base-to-novel":
            note += " Harmonic means are compared with that of our mean base and mean novel accuracy, as in papers."
        notes.append(f"{note} Read in: {read_in}.")
    if differing := differences_from_papers([record for cell in group.cells.values() for record in cell.values()]):
        notes.append(f"Not the papers' data, and therefore without published numbers: {'; '.join(differing)}.")
    return notes


_PUBLISHED_COSTS = {
    "gflops": "GFLOPs",
    "images_per_second": "Inference, images/s",
    "seconds": "Training, s",
    "megabytes": "Memory, MB",
    "milliseconds": "Training, ms/image",
}


def cost_tables(costs: Sequence[CostRow], methods: Mapping[str, MethodDescription]) -> list[Table]:
    """For each backbone, number of classes and machine: parameters and operations, throughput, published costs.

    Example:
        >>> collection = collect(Path("runs"), describe_methods())
        >>> [table.caption for table in cost_tables(collection.costs, collection.methods)]
    """
    described = {row.name: methods.get(row.name, MethodDescription(code_title(row.name))) for row in costs}
    by_conditions: dict[str, list[CostRow]] = defaultdict(list)
    for row in sorted(costs, key=lambda row: (row.conditions, described[row.name].order, row.recipe)):
        by_conditions[row.conditions].append(row)
    tables = []
    for conditions, rows in by_conditions.items():
        labels = []
        for row in rows:
            # The title, and what the recipe adds to the method's name.
            title, recipe = described[row.name].title, row.recipe.replace("_", "-")
            rest = recipe.removeprefix(row.name.replace("_", "-"))
            labels.append(f"{title} ({row.recipe})" if rest == recipe else title + rest)
        rows_of = [
            (label if labels.count(label) == 1 else f"{label} ({row.parameters:,} parameters)", row)
            for label, row in zip(labels, rows, strict=True)
        ]
        tables.append(_complexity_table(conditions, rows_of))
        if any(row.speeds for row in rows):
            tables.append(_throughput_table(conditions, rows_of))
        tables += _published_costs_table(rows_of)
    return tables


def _complexity_table(conditions: str, rows_of: list[tuple[str, CostRow]]) -> Table:
    columns = ["Method", "Parameters", "% of CLIP", "GFLOPs, whole", "GFLOPs, as run", "GFLOPs, classes cached"]
    is_counted = all(row.embedding_parameters for _, row in rows_of)
    if is_counted:
        columns.insert(3, "% without token embeddings")
    rows = []
    for label, row in rows_of:
        flops = (row.flops_plain, row.flops, row.flops_cached)
        texts = [f"{row.parameters:,}", f"{100 * row.parameters / row.backbone_parameters:.3g}"]
        if is_counted:
            texts.append(f"{100 * row.parameters / (row.backbone_parameters - row.embedding_parameters):.3g}")
        texts += [_number(None if count is None else count / 2e9) for count in flops]
        rows.append((label, tuple(Cell(text) for text in texts)))
    notes = (
        "GFLOPs: one image against the prompts of all classes, a multiply-add counted as one, as papers do. “Whole”: "
        "every sentence at full length and every row of every block, as papers count. “As run”: as this package "
        "computes it. “Classes cached”: the classes are encoded beforehand.",
        "% of CLIP: learned parameters against all parameters of the frozen backbone"
        + ("; then without its token embeddings, as papers count." if is_counted else "."),
    )
    return Table(f"Complexity: {conditions}", (Section("", tuple(columns), tuple(rows)),), notes)


def _throughput_table(conditions: str, rows_of: list[tuple[str, CostRow]]) -> Table:
    titles = {
        "training": "Training",
        "inference": "Inference, classes each time",
        "cached": "Inference, classes cached",
    }
    sizes = sorted({speed.batch for _, row in rows_of for speed in row.speeds})
    sections = []
    for kind, title in titles.items():
        rows = []
        for label, row in rows_of:
            speeds = {speed.batch: getattr(speed, kind) for speed in row.speeds}
            rows.append((label, tuple(Cell(_number(speeds.get(size))) for size in sizes)))
        sections.append(Section(title, ("Method", *(f"Batch {size}" for size in sizes)), tuple(rows)))
    note = (
        "Images per second, median, on random images, without reading files; higher is better. Training: a whole "
        "step. “Classes each time”: every batch encodes all classes again, as the reference code does. “Classes "
        "cached”: they are encoded once, beforehand."
    )
    return Table(f"Throughput, images per second: {conditions}", tuple(sections), (note,))


def _published_costs_table(rows_of: list[tuple[str, CostRow]]) -> list[Table]:
    published = [(label, cost) for label, row in rows_of for cost in published_costs(row)]
    sections = []
    for source in dict.fromkeys(cost.read_in for _, cost in published):
        here = [(label, cost) for label, cost in published if cost.read_in == source]
        fields = [name for name in _PUBLISHED_COSTS if any(getattr(cost, name) is not None for _, cost in here)]
        rows = []
        for label, cost in here:
            values = [getattr(cost, name) for name in fields]
            rows.append((label, tuple(Cell(NOTHING if value is None else f"{value:,g}") for value in values)))
        sections.append(Section(source, ("Method", *(_PUBLISHED_COSTS[name] for name in fields)), tuple(rows)))
    note = (
        "Measured by others, on other machines; ViT-B/16. Not to be compared with the throughput above. How operations "
        "were counted, and for how many classes, is not stated there."
    )
    return [Table("Published costs", tuple(sections), (note,))] if sections else []


def _number(value: float | None) -> str:
    """Four digits, or all before the point."""
    if value is None:
        return NOTHING
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
