"""Tables as Markdown and LaTeX, evaluations as CSV."""

import csv
import io
import shlex
from pathlib import PurePath
from typing import Any

from maple.report.records import Collection, CostRow, Problem
from maple.report.tables import Cell, Table

_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
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


def markdown(headline: str, tables: list[Table], collection: Collection) -> str:
    """The headline, the tables, and what was left out."""
    parts = [_markdown_text(headline)]
    for table in tables:
        lines = [f"## {_markdown_text(table.caption)}", ""]
        for section in table.sections:
            if section.title:
                lines += [f"**{_markdown_text(section.title)}**", ""]
            lines.append(f"| {' | '.join(_markdown_text(column) for column in section.columns)} |")
            lines.append("|---|" + "---:|" * (len(section.columns) - 1))
            for label, cells in section.rows:
                lines.append(f"| {' | '.join([_markdown_text(label), *map(_markdown_cell, cells)])} |")
            lines.append("")
        lines += [f"{_markdown_text(note)}\n" for note in table.notes]
        parts.append("\n".join(lines).rstrip())
    for title, problems in (("Runs without an evaluation", collection.silent), ("Left out", collection.problems)):
        if problems:
            parts.append("\n".join([f"## {title}", "", *(_markdown_problem(problem) for problem in problems)]))
    return "\n\n".join(parts) + "\n"


def _markdown_text(text: str) -> str:
    for special in "\\`*_<>[]|#~":
        text = text.replace(special, f"\\{special}")
    return " ".join(text.split())


def _markdown_cell(cell: Cell) -> str:
    text = _markdown_text(cell.text)
    text = f"**{text}**" if cell.best else text
    return f"{text} ± {cell.deviation}" if cell.deviation else text


def _markdown_problem(problem: Problem) -> str:
    return f"- {_markdown_text(problem.place)}: {_markdown_text(problem.reason)}"


def latex(tables: list[Table]) -> str:
    """One table environment each, no wider than the column; the document loads booktabs and graphicx."""
    return "% needs \\usepackage{booktabs,graphicx}\n\n" + "\n\n".join(_latex_table(table) for table in tables) + "\n"


def _latex_table(table: Table) -> str:
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
            lines += [_latex_row([latex_text(column) for column in columns], width), r"\midrule"]
        if section.title:
            lines.append(rf"\multicolumn{{{width}}}{{l}}{{\emph{{{latex_text(section.title)}}}}} \\")
        lines += [
            _latex_row([latex_text(label), *(_latex_cell(cell) for cell in cells)], width)
            for label, cells in section.rows
        ]
    lines += [r"\bottomrule", r"\end{tabular}}"]
    if table.notes:
        lines += ["", r"\smallskip", r"\parbox{\linewidth}{\footnotesize " + latex_text(" ".join(table.notes)) + "}"]
    return "\n".join([*lines, r"\end{table}"])


def _latex_row(cells: list[str], width: int) -> str:
    """Cells of a narrower section leave the gap before their last column."""
    return " & ".join([*cells[:-1], *[""] * (width - len(cells)), cells[-1]]) + r" \\"


def _latex_cell(cell: Cell) -> str:
    text = latex_text(cell.text)
    text = rf"\textbf{{{text}}}" if cell.best else text
    return rf"{text} {{\scriptsize $\pm$ {cell.deviation}}}" if cell.deviation else text


def latex_text(text: str) -> str:
    """Text that LaTeX prints as it stands."""
    return "".join(_LATEX.get(character, character) for character in " ".join(text.split()))


CSV_COLUMNS = (
    *("run", "method", "settings", "backbone", "pretrained", "precision", "fingerprint", "source_dataset", "shots"),
    *("trained_on", "seed", "dataset", "classes", "part", "class_count", "images", "top1", "top5", "macro_f1"),
    *("calibration_error", "items", "command", "started", "python", "machine", "device", "threads", "versions"),
)
COST_COLUMNS = (
    *("recipe", "method", "settings", "backbone", "precision", "image_size", "classes", "parameters"),
    *("backbone_parameters", "flops_plain", "flops", "flops_cached", "batch", "training", "inference", "cached"),
    *("where", "command", "started", "python", "machine", "device", "threads", "versions"),
)


def comma_separated(collection: Collection) -> str:
    """One line for each evaluation of each run, with its command and environment; accuracies as fractions."""
    text = io.StringIO()
    writer = csv.DictWriter(text, CSV_COLUMNS, lineterminator="\n")
    writer.writeheader()
    for evaluation in collection.evaluations:
        row = evaluation.row
        writer.writerow(
            {
                "run": evaluation.run.name,
                "method": evaluation.method,
                "settings": " ".join(f"{key}={value}" for key, value in sorted(evaluation.settings.items())),
                "backbone": row.backbone.name,
                "pretrained": row.backbone.pretrained or "",
                "precision": row.backbone.precision,
                "fingerprint": row.backbone.fingerprint,
                "source_dataset": row.source.dataset,
                "shots": "all" if row.source.shots is None else row.source.shots,
                "trained_on": row.source.classes,
                "seed": row.seed,
                "dataset": evaluation.dataset,
                "classes": row.classes,
                "part": row.part,
                "class_count": len(row.class_names),
                "images": row.images,
                "top1": row.top1,
                "top5": row.top5,
                "macro_f1": row.macro_f1,
                "calibration_error": row.calibration_error,
                "items": row.items,
                **told_environment(evaluation.run.environment),
            }
        )
    return text.getvalue()


def comma_separated_costs(costs: tuple[CostRow, ...]) -> str:
    """One line for each method and batch size, in images per second; operations are floating-point ones."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COST_COLUMNS, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    for row in costs:
        settings = " ".join(f"{key}={value}" for key, value in sorted(row.method.items()) if key != "name")
        own = {**row.model_dump(exclude={"environment", "speeds", "machine", "device"}), "method": row.name}
        known = {**own, "settings": settings, "where": f"{row.device}: {row.machine}"}
        for speed in row.speeds or (None,):
            timed = {} if speed is None else speed.model_dump()
            writer.writerow({**known, **timed, **told_environment(row.environment)})
    return text.getvalue()


def told_environment(environment: dict[str, Any]) -> dict[str, str]:
    """The command as one would type it, and what it ran on; nothing where nothing was recorded."""
    versions = environment.get("versions")
    told = {key: str(environment.get(key, "")) for key in ("started", "python", "machine", "device", "threads")}
    packages = versions.items() if isinstance(versions, dict) else ()
    return {
        "command": command_of(environment),
        **told,
        "versions": " ".join(f"{name}={version}" for name, version in packages),
    }


def command_of(environment: dict[str, Any]) -> str:
    """The command that was recorded; "" where none was."""
    command = environment.get("command")
    words = [str(word) for word in command] if isinstance(command, list) else []
    if words and PurePath(words[0]).name in ("__main__.py", "maple"):
        words[0] = "maple"
    return shlex.join(words)
