"""What methods cost, as tables: parameters and operations, throughput, and published figures of the same methods."""

from collections import defaultdict

from maple.report.costs import PublishedCost, published_costs
from maple.report.records import CostRow
from maple.report.tables import NOTHING, Cell, Section, Table
from maple.report.variants import TITLES

_OPERATIONS = (
    "GFLOPs: one image against the prompts of all classes, a multiply-add counted as one, as papers do. “Whole”: every "
    "sentence at full length and every row of every block, as papers count. “As run”: as this package computes it. "
    "“Classes cached”: the classes are encoded beforehand."
)
_SHARE = "% of CLIP: learned parameters against all parameters of the frozen backbone."
_SPEED = (
    "Images per second, median, on random images, without reading files; higher is better. Training: a whole step. "
    "“Classes each time”: every batch encodes all classes again, as the reference code does. “Classes cached”: they "
    "are encoded once, beforehand."
)
_FIELDS = {
    "gflops": "GFLOPs",
    "images_per_second": "Inference, images/s",
    "seconds": "Training, s",
    "megabytes": "Memory, MB",
    "milliseconds": "Training, ms/image",
}


def cost_tables(costs: tuple[CostRow, ...]) -> list[Table]:
    """For each backbone, class count and machine: what is counted, what is timed, and what was published."""
    alike: dict[str, list[CostRow]] = defaultdict(list)
    order = list(TITLES)
    for row in sorted(
        costs, key=lambda row: (row.conditions, order.index(row.name) if row.name in order else len(order), row.recipe)
    ):
        alike[row.conditions].append(row)
    tables = []
    for conditions, rows in alike.items():
        labels = _labels(rows)
        tables.append(_counted(conditions, rows, labels))
        if any(row.speeds for row in rows):
            tables.append(_timed(conditions, rows, labels))
        if published := _published(rows, labels):
            tables.append(published)
    return tables


def label_of(row: CostRow) -> str:
    """How tables call it: the method, and what its recipe adds to its name."""
    title, recipe = TITLES.get(row.name, row.name), row.recipe.replace("_", "-")
    rest = recipe.removeprefix(row.name.replace("_", "-"))
    return f"{title} ({row.recipe})" if rest == recipe else title + rest


def _labels(rows: list[CostRow]) -> dict[str, str]:
    """{identity: label}; two recipes of one label are told apart by their numbers of parameters."""
    plain = [label_of(row) for row in rows]
    return {
        row.identity: label if plain.count(label) == 1 else f"{label} ({row.parameters:,} parameters)"
        for row, label in zip(rows, plain, strict=True)
    }


def _counted(conditions: str, rows: list[CostRow], labels: dict[str, str]) -> Table:
    columns = ("Method", "Parameters", "% of CLIP", "GFLOPs, whole", "GFLOPs, as run", "GFLOPs, classes cached")
    found = []
    for row in rows:
        operations = (row.flops_plain, row.flops, row.flops_cached)
        cells = [f"{row.parameters:,}", f"{100 * row.parameters / row.backbone_parameters:.3g}"]
        cells += [NOTHING if one is None else number(one / 2e9) for one in operations]
        found.append((labels[row.identity], tuple(Cell(cell) for cell in cells)))
    return Table(f"Complexity: {conditions}", (Section("", columns, tuple(found)),), (_OPERATIONS, _SHARE))


def _timed(conditions: str, rows: list[CostRow], labels: dict[str, str]) -> Table:
    ways = (
        ("training", "Training"),
        ("inference", "Inference, classes each time"),
        ("cached", "Inference, classes cached"),
    )
    sizes = sorted({speed.batch for row in rows for speed in row.speeds})
    sections = []
    for way, title in ways:
        lines = []
        for row in rows:
            speeds = {speed.batch: getattr(speed, way) for speed in row.speeds}
            cells = [NOTHING if speeds.get(size) is None else number(speeds[size]) for size in sizes]
            lines.append((labels[row.identity], tuple(Cell(cell) for cell in cells)))
        sections.append(Section(title, ("Method", *(f"Batch {size}" for size in sizes)), tuple(lines)))
    return Table(f"Throughput, images per second: {conditions}", tuple(sections), (_SPEED,))


def _published(rows: list[CostRow], labels: dict[str, str]) -> Table | None:
    found: list[tuple[str, PublishedCost]] = [
        (labels[row.identity], one) for row in rows for one in published_costs(row)
    ]
    if not found:
        return None
    sections = []
    for place in dict.fromkeys(one.read_in for _, one in found):
        here = [(label, one) for label, one in found if one.read_in == place]
        fields = [name for name in _FIELDS if any(getattr(one, name) is not None for _, one in here)]
        lines = []
        for label, one in here:
            values = [getattr(one, name) for name in fields]
            lines.append((label, tuple(Cell(NOTHING if value is None else f"{value:,g}") for value in values)))
        sections.append(Section(place, ("Method", *(_FIELDS[name] for name in fields)), tuple(lines)))
    note = (
        "Measured by others, on other machines; ViT-B/16. Not to be compared with the throughput above. How operations "
        "were counted, and for how many classes, is not said there."
    )
    return Table("Published costs", tuple(sections), (note,))


def number(value: float) -> str:
    """Four digits, or all before the point."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
