"""What each published data set must count, from the package's table."""

import csv
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources


@dataclass(frozen=True, slots=True)
class Statistics:
    """Published numbers of one data set. None is what nobody has published, or what could not be checked.

    `counts` has the keys train, val, test, test_base, test_new and classes; `class_names` is the SHA-256 of the list
    of class names, see `names_hash`.
    """

    counts: dict[str, int | None]
    class_names: str | None
    source: str


COUNTED = ("train", "val", "test", "test_base", "test_new", "classes")


@cache
def published_statistics() -> dict[str, Statistics]:
    """The table by name of the catalogue."""
    text = resources.files("maple").joinpath("assets", "datasets", "statistics.csv").read_text(encoding="utf-8")
    return {
        row["dataset"]: Statistics(
            {name: int(row[name]) if row[name] else None for name in COUNTED},
            row["class_names_sha256"] or None,
            row["source"],
        )
        for row in csv.DictReader(text.splitlines())
    }


def names_hash(class_names: Sequence[str]) -> str:
    """The SHA-256 (hex) of class names in their order."""
    return hashlib.sha256(json.dumps(list(class_names)).encode("ascii")).hexdigest()
