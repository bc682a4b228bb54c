"""`write_report`: a folder of runs in, files out."""

from collections.abc import Sequence
from pathlib import Path

from maple import files
from maple.errors import ConfigError, one_of
from maple.report.collect import collect
from maple.report.cost_tables import cost_tables
from maple.report.formats import comma_separated, comma_separated_costs, latex, markdown
from maple.report.groups import group_evaluations
from maple.report.headline import headline
from maple.report.page import Picture, make_page
from maple.report.records import Collection
from maple.report.shot_tables import shots_tables
from maple.report.shots import find_shot_curves
from maple.report.tables import Table, make_tables

FORMATS = {"html": ".html", "markdown": ".md", "latex": ".tex", "csv": ".csv"}
COSTS_CSV = "complexity-csv"
"""What a .csv cannot hold beside the evaluations, since its columns are others: a file of its own."""


class Report:
    """All evaluations below a folder, ready to be written in any format."""

    def __init__(self, folder: Path) -> None:
        """Read the runs.

        Raises:
            DataError: there is nothing to report.
        """
        self.collection: Collection = collect(folder)
        self.groups = group_evaluations(self.collection)
        self.curves = find_shot_curves(self.groups)
        self.tables: list[Table] = [
            *(table for curves in self.curves for table in shots_tables(curves)),
            *make_tables(self.groups),
            *cost_tables(self.collection.costs),
        ]

    @property
    def headline(self) -> str:
        """The result in plain words."""
        return headline(self.groups, self.collection.costs)

    def text(self, kind: str, picture: Picture | None = None) -> str:
        """The content of one file.

        Raises:
            ConfigError: an unknown format, or one whose packages are not installed.
        """
        if kind == "html":
            return make_page(self.collection, self.groups, self.curves, picture)
        if kind == "markdown":
            return markdown(self.headline, self.tables, self.collection)
        if kind == "latex":
            return latex(self.tables)
        if kind == "csv":
            return comma_separated(self.collection)
        if kind == COSTS_CSV:
            return comma_separated_costs(self.collection.costs)
        raise ConfigError(one_of("format", kind, FORMATS))


def write_report(
    folder: Path, formats: Sequence[str] = ("html",), output: Path | None = None, picture: Picture | None = None
) -> tuple[Report, list[Path]]:
    """Report on the runs below `folder`; nothing is written unless every format can be made.

    Args:
        formats: of html, markdown, latex, csv; beside the .csv, what methods cost gets one of its own.
        output: a folder for report.html, report.md, ...; or, for one format, a file. Default: `folder`.
        picture: gives the pictures of the page; without it their names stand there.

    Returns:
        The report, and the files written.

    Raises:
        DataError: there is nothing to report.
        ConfigError: an unknown format, a missing package, or one file for several formats.
    """
    for kind in formats:
        if kind not in FORMATS:
            raise ConfigError(one_of("format", kind, FORMATS))
    formats = list(dict.fromkeys(formats))
    target = output or folder
    as_file = output is not None and output.suffix in FORMATS.values() and not output.is_dir()
    if as_file and len(formats) > 1:
        raise ConfigError(
            f"{output} is one file, but {len(formats)} formats were asked for ({', '.join(formats)}); name a folder"
        )
    if not as_file and target.is_file():
        raise ConfigError(f"{target} is a file; name a folder, or a file that ends in {', '.join(FORMATS.values())}")
    report = Report(folder)
    contents = {
        target if as_file else target / f"report{FORMATS[kind]}": report.text(kind, picture) for kind in formats
    }
    if "csv" in formats and report.collection.costs:
        beside = target if as_file else target / "report.csv"
        contents[beside.with_name(f"{beside.stem}_complexity.csv")] = report.text(COSTS_CSV)
    written = []
    for path, text in contents.items():
        try:
            # File names may hold bytes that are no text in any encoding; they are shown as codes.
            files.write_text(path, text.encode("utf-8", "backslashreplace").decode("utf-8"))
        except OSError as error:
            raise ConfigError(f"{path} cannot be written ({error.strerror}); choose another --output") from error
        written.append(path)
    return report, written
