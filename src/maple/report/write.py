"""Reports as files: Markdown, LaTeX, CSV and one HTML page, of the runs below a folder."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from maple import files
from maple.descriptions import MethodDescription
from maple.errors import ConfigError, one_of
from maple.report.collect import collect
from maple.report.groups import group_evaluations
from maple.report.headline import headline_sentences
from maple.report.page import Opening, ThumbnailLoader, make_page
from maple.report.records import Collection, CostRow, command_of, harmless
from maple.report.series import find_shot_curves
from maple.report.tables import Cell, Table, cost_tables, group_tables, shots_tables

FORMATS = {"html": ".html", "markdown": ".md", "latex": ".tex", "csv": ".csv"}

_LATEX = str.maketrans(
    {
        **{character: f"\\{character}" for character in "&%$#_{}"},
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        "±": r"$\pm$",
        "−": r"$-$",
        "–": "--",
        "“": "``",
        "”": "''",
    }
)
_EVALUATION_COLUMNS = (
    *("run", "method", "settings", "backbone", "pretrained", "precision", "fingerprint", "source_dataset", "shots"),
    *("trained_on", "seed", "dataset", "classes", "part", "class_count", "images", "top1", "top5", "macro_f1"),
    *("calibration_error", "items"),
)
_MARKDOWN = str.maketrans({character: f"\\{character}" for character in "\\`*_<>[]|#~"})


class Report:
    """All evaluations below a folder, ready to be written in any format.

    Example:
        >>> report = Report(Path("runs"), describe_methods())
        >>> print(report.headline)
        >>> latex = report.text("latex")
    """

    def __init__(self, folder: Path, methods: Mapping[str, MethodDescription]) -> None:
        """Read the runs.

        Raises:
            DataError: there is nothing to report.
        """
        self.collection: Collection = collect(folder, methods)
        self.groups = group_evaluations(self.collection)
        self.curves = find_shot_curves(self.groups)
        self.tables: list[Table] = [
            *(table for curves in self.curves for table in shots_tables(curves)),
            *(table for group in self.groups for table in group_tables(group)),
            *cost_tables(self.collection.costs, methods),
        ]

    @property
    def headline(self) -> str:
        """The result in plain words."""
        return " ".join(headline_sentences(self.groups, self.collection.costs))

    def text(self, kind: str, load_thumbnail: ThumbnailLoader | None = None, opening: Opening | None = None) -> str:
        """The content of one file; `opening` is that of a page.

        Raises:
            ConfigError: an unknown format.
        """
        if kind == "html":
            return make_page(self.collection, self.groups, self.curves, load_thumbnail, opening)
        if kind == "markdown":
            return _markdown(self)
        if kind == "latex":
            preamble = "% needs \\usepackage{booktabs,graphicx}\n\n"
            return preamble + "\n\n".join(_latex_table(table) for table in self.tables) + "\n"
        if kind == "csv":
            return evaluations_csv(self.collection)
        raise ConfigError(one_of("format", kind, FORMATS))


def write_report(
    folder: Path,
    formats: Sequence[str] | None = None,
    output: Path | None = None,
    *,
    methods: Mapping[str, MethodDescription],
    load_thumbnail: ThumbnailLoader | None = None,
    opening: Opening | None = None,
) -> tuple[Report, list[Path]]:
    """Report on the runs below `folder`; nothing is written unless every format can be made.

    Args:
        formats: of html, markdown, latex, csv; with csv, the costs of methods get a file of their own. None: the one
            that the ending of `output` says, otherwise html.
        output: a folder for report.html, report.md, ...; or, for one format, a file. Default: `folder`.
        methods: from `maple.methods.describe_methods()`.
        load_thumbnail: gives the images of the page; without it their names are shown.
        opening: how the page begins, in place of a summary of all evaluations.

    Raises:
        DataError: there is nothing to report.
        ConfigError: an unknown format, one file for several formats, or a file with the ending of another one.

    Example:
        >>> report, paths = write_report(Path("runs"), ["html", "latex"], methods=describe_methods())
    """
    target = output or folder
    by_ending = {ending: kind for kind, ending in FORMATS.items()}
    file_format = by_ending.get(target.suffix) if output is not None and not target.is_dir() else None
    is_file = file_format is not None
    formats = list(dict.fromkeys([file_format or "html"] if formats is None else formats))
    for kind in formats:
        if kind not in FORMATS:
            raise ConfigError(one_of("format", kind, FORMATS))
    if is_file and len(formats) > 1:
        raise ConfigError(
            f"{output} is one file, but {len(formats)} formats were requested ({', '.join(formats)}); name a folder"
        )
    if is_file and (others := [kind for kind in formats if kind != file_format]):
        raise ConfigError(
            f"{output} would be a file of {others[0]} that ends as one of {file_format}; name it "
            f"{target.with_suffix(FORMATS[others[0]]).name}, or leave out the format"
        )
    if not is_file and target.is_file():
        raise ConfigError(f"{target} is a file; name a folder, or a file that ends in {', '.join(FORMATS.values())}")
    report = Report(folder, methods)
    texts = {
        target if is_file else target / f"report{FORMATS[kind]}": report.text(kind, load_thumbnail, opening)
        for kind in formats
    }
    if "csv" in formats and report.collection.costs:
        path = target if is_file else target / "report.csv"
        texts[path.with_name(f"{path.stem}_complexity.csv")] = costs_csv(report.collection.costs)
    for path, text in texts.items():
        with files.output_errors(path):
            files.write_text(path, text)
    return report, list(texts)


def _markdown(report: Report) -> str:
    """The headline, the tables, and what was left out."""

    def escaped(text: str) -> str:
        return " ".join(harmless(text).translate(_MARKDOWN).split())

    def cell_text(cell: Cell) -> str:
        text = f"**{escaped(cell.text)}**" if cell.best else escaped(cell.text)
        return f"{text} ± {cell.deviation}" if cell.deviation else text

    parts = [escaped(report.headline)]
    for table in report.tables:
        lines = [f"## {escaped(table.caption)}", ""]
        for section in table.sections:
            if section.title:
                lines += [f"**{escaped(section.title)}**", ""]
            lines.append(f"| {' | '.join(map(escaped, section.columns))} |")
            lines.append("|---|" + "---:|" * (len(section.columns) - 1))
            lines += [f"| {' | '.join([escaped(label), *map(cell_text, cells)])} |" for label, cells in section.rows]
            lines.append("")
        lines += [f"{escaped(note)}\n" for note in table.notes]
        parts.append("\n".join(lines).rstrip())
    collection = report.collection
    lists = {"Runs without an evaluation": collection.without_evaluation, "Left out": collection.problems}
    for title, problems in lists.items():
        lines = [f"- {escaped(problem.place)}: {escaped(problem.reason)}" for problem in problems]
        parts += ["\n".join([f"## {title}", "", *lines])] if lines else []
    return "\n\n".join(parts) + "\n"


def latex_text(text: str) -> str:
    """Text that LaTeX prints as it is."""
    return " ".join(harmless(text).split()).translate(_LATEX)


def _latex_table(table: Table) -> str:
    """A table environment, no wider than the column; the document loads booktabs and graphicx."""

    def cell_text(cell: Cell) -> str:
        text = rf"\textbf{{{latex_text(cell.text)}}}" if cell.best else latex_text(cell.text)
        return rf"{text} {{\scriptsize $\pm$ {cell.deviation}}}" if cell.deviation else text

    def line(cells: list[str]) -> str:
        # Cells of a narrower section leave the gap before their last column.
        return " & ".join([*cells[:-1], *[""] * (width - len(cells)), cells[-1]]) + r" \\"

    width = max(len(section.columns) for section in table.sections)
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{latex_text(table.caption)}}}",
        r"\smallskip",
        r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
        rf"\begin{{tabular}}{{l{'r' * (width - 1)}}}",
        r"\toprule",
    ]
    columns: tuple[str, ...] = ()
    for section in table.sections:
        if columns:
            lines.append(r"\midrule")
        if section.columns != columns:
            columns = section.columns
            lines += [line([latex_text(column) for column in columns]), r"\midrule"]
        if section.title:
            lines.append(rf"\multicolumn{{{width}}}{{l}}{{\emph{{{latex_text(section.title)}}}}} \\")
        lines += [line([latex_text(label), *map(cell_text, cells)]) for label, cells in section.rows]
    lines += [r"\bottomrule", r"\end{tabular}}"]
    if table.notes:
        lines += ["", r"\smallskip", r"\parbox{\linewidth}{\footnotesize " + latex_text(" ".join(table.notes)) + "}"]
    return "\n".join([*lines, r"\end{table}"])


def evaluations_csv(collection: Collection) -> str:
    """One line for each evaluation of each run, with its command and environment; accuracies as fractions."""
    lines = []
    for evaluation in collection.evaluations:
        row = evaluation.row
        columns = {
            **row.model_dump(exclude={"backbone", "source"}),
            **row.backbone.model_dump(exclude={"name"}),
            "run": evaluation.run.name,
            "method": evaluation.method,
            "settings": _flat(evaluation.stored_settings),
            "backbone": row.backbone.name,
            "source_dataset": row.source.dataset,
            "shots": "all" if row.source.shots is None else row.source.shots,
            "trained_on": row.source.classes,
            "dataset": evaluation.dataset,
            "class_count": len(row.class_names),
        }
        lines.append({**columns, **_environment_columns(evaluation.run.environment)})
    return _csv([*_EVALUATION_COLUMNS, *_environment_columns({})], lines)


def costs_csv(costs: tuple[CostRow, ...]) -> str:
    """One line for each method and batch size, in images per second; operations are floating-point ones."""
    counted = ("precision", "image_size", "classes", "parameters", "backbone_parameters", "embedding_parameters")
    lines = []
    for row in costs:
        settings = _flat({key: value for key, value in row.method.items() if key != "name"})
        columns = {"recipe": row.recipe, "method": row.name, "settings": settings, "backbone": row.backbone}
        columns |= {name: getattr(row, name) for name in (*counted, "flops_plain", "flops", "flops_cached")}
        for speed in row.speeds or (None,):
            timed = {name: getattr(speed, name, None) for name in ("batch", "training", "inference", "cached")}
            where = {"where": f"{row.device}: {row.machine}"}
            lines.append({**columns, **timed, **where, **_environment_columns(row.environment)})
    return _csv(list(lines[0]), lines)


def _flat(settings: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in sorted(settings.items()))


def _csv(columns: list[str], lines: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows({key: _csv_cell(value) for key, value in line.items()} for line in lines)
    return text.getvalue()


def _csv_cell(value: Any) -> Any:
    """A value on one line; an apostrophe keeps spreadsheets from running a text as a formula."""
    if not isinstance(value, str):
        return value
    text = " ".join(harmless(value).splitlines())
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


def _environment_columns(environment: dict[str, Any]) -> dict[str, str]:
    """The command and where it ran; "" where nothing was recorded."""
    versions = environment.get("versions")
    packages = versions.items() if isinstance(versions, dict) else ()
    columns = {key: str(environment.get(key, "")) for key in ("started", "python", "machine", "device", "threads")}
    versions_text = " ".join(f"{name}={version}" for name, version in packages)
    return {"command": command_of(environment), **columns, "versions": versions_text}
