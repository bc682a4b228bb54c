"""What methods cost, as `maple efficiency` writes it down, and published figures to hold beside."""

import csv
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path

from pydantic import ValidationError

from maple.report.records import CostRow, Problem

FOLDER = "complexity"
"""The folder of the records, in a folder of runs."""

_B16 = "vit-b-16"


@dataclass(frozen=True)
class PublishedCost:
    """What a paper or its authors say a method costs, on ViT-B/16, and where it was read; None where they are silent.

    Attributes:
        gflops: a multiply-add is one.
        seconds, megabytes: training on one data set of the base-to-novel average, and its memory.
        milliseconds: training, per image.
    """

    gflops: float | None
    images_per_second: float | None
    seconds: float | None
    megabytes: float | None
    milliseconds: float | None
    read_in: str


def published_costs(row: CostRow) -> tuple[PublishedCost, ...]:
    """What was published of this method, where backbone and prompts are those of the papers; one for each source."""
    usual = row.recipe == row.name and row.method.get("prompt_length", 4) == {"maple": 2, "prograd": 16}.get(
        row.name, 4
    )
    if row.backbone.lower().replace("/", "-") != _B16 or not usual:
        return ()
    return _published().get(row.name, ())


@cache
def _published() -> dict[str, tuple[PublishedCost, ...]]:
    text = (resources.files("maple.report") / "published_costs.csv").read_text(encoding="utf-8")
    columns = ("gflops", "images_per_second", "seconds", "megabytes", "milliseconds")
    found: dict[str, tuple[PublishedCost, ...]] = {}
    for line in csv.DictReader(text.splitlines()):
        values = {column: float(line[column]) if line[column] else None for column in columns}
        one = PublishedCost(read_in=line["read_in"], **values)
        found[line["method"]] = (*found.get(line["method"], ()), one)
    return found


def read_costs(folder: Path) -> tuple[tuple[CostRow, ...], tuple[Problem, ...]]:
    """Every record in a folder named `complexity` below `folder`, or in `folder` itself if that is its name.

    Of two measurements of one thing the later one counts. A damaged file is a problem, and costs itself alone.
    """
    found: dict[str, CostRow] = {}
    problems = []
    for path in _files(folder):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            row = CostRow.model_validate(content)
        except (OSError, ValueError) as error:
            place = path.relative_to(folder).as_posix()
            problems.append(Problem(place, f"is no record of `maple efficiency`: {_brief(error)}"))
            continue
        known = found.get(row.identity)
        if known is None or _started(known) <= _started(row):
            found[row.identity] = row
    return tuple(found.values()), tuple(problems)


def _files(folder: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if Path(place).name == FOLDER or (Path(place) == folder and folder.resolve().name == FOLDER):
            yield from (Path(place) / name for name in sorted(names) if name.endswith(".json") and name[0] != ".")
        if "config.json" in names:
            folders.clear()  # a run


def _started(row: CostRow) -> str:
    return str(row.environment.get("started", ""))


def _brief(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors()[0]
    return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
