"""What `maple explain` left in run folders: heat maps, and the words near learned tokens. A damaged file is listed."""

import base64
from dataclasses import dataclass
from typing import TypeVar

from pydantic import Field, ValidationError

from maple.descriptions import MethodDescription
from maple.files import regular
from maple.plugins import code_title
from maple.report.predictions import evenly
from maple.report.records import Collection, Problem, RunRecord, Stored, read_stored, reason_of

FOLDER = "explanation"
_MOST_RUNS = 4
_MOST_MAPS = 4  # of one run, evenly spaced along its list
_MOST_WORD_SETS = 4
_LARGEST_PNG = 4 * 1024 * 1024
_PNG = b"\x89PNG\r\n\x1a\n"


class HeatMapRecord(Stored):
    """An entry of maps.json."""

    source: str
    class_: str = Field(alias="class")
    png: str = Field(pattern=r"^[0-9]{3,}_[A-Za-z0-9_-]*\.png$")


class _Distance(Stored):
    word: str
    distance: float


class _Cosine(Stored):
    word: str
    cosine: float


class NearestWords(Stored):
    """The words near one learned token."""

    by_distance: tuple[_Distance, ...]
    by_cosine: tuple[_Cosine, ...]


class TokenSet(Stored):
    """The learned tokens of one class, or of all classes."""

    class_: str | None = Field(None, alias="class")
    tokens: tuple[NearestWords, ...]


class _Maps(Stored):
    maps: tuple[HeatMapRecord, ...]


class _Words(Stored):
    warning: str
    notes: tuple[str, ...] = ()
    sets: tuple[TokenSet, ...]


File = TypeVar("File", bound=Stored)


@dataclass(frozen=True)
class ExplainedRun:
    """The explanations of one run that are shown; `maps` are (data URI, alternative text), of `count`."""

    run: str
    method: str
    maps: list[tuple[str, str]]
    count: int
    words: tuple[TokenSet, ...]
    notes: str


def explained_runs(collection: Collection, problems: list[Problem]) -> list[ExplainedRun]:
    """The first runs that were explained; damaged files are appended to `problems`."""
    explained: list[ExplainedRun] = []
    for run in collection.runs:
        if len(explained) == _MOST_RUNS or not (run.folder / FOLDER).is_dir():
            continue
        name = str((run.settings.get("method") or {}).get("name"))
        title = collection.methods.get(name, MethodDescription(code_title(name))).title
        stored = _read(run, "maps.json", _Maps, problems)
        maps = stored.maps if stored else ()
        chosen = [maps[index] for index in evenly(len(maps), min(len(maps), _MOST_MAPS))]
        shown = [drawn for entry in chosen if (drawn := _read_png(run, entry, problems))]
        words = _read(run, "words.json", _Words, problems)
        more = len(words.sets) - _MOST_WORD_SETS if words else 0
        cut = [f"The tokens of {more} more classes are in words.json."] if more > 0 else []
        notes = " ".join([*words.notes, *cut, words.warning]) if words else ""
        sets = words.sets[:_MOST_WORD_SETS] if words else ()
        if shown or sets:
            explained.append(ExplainedRun(run.name, title, shown, len(maps), sets, notes))
    return explained


def _read(run: RunRecord, name: str, kind: type[File], problems: list[Problem]) -> File | None:
    path, place = run.folder / FOLDER / name, f"{run.name}/{FOLDER}/{name}"
    content = read_stored(path, place, problems) if path.exists() else None
    try:
        return None if content is None else kind(**content)
    except (ValidationError, TypeError) as error:
        problems.append(Problem(place, f"unreadable or damaged: {reason_of(error)}"))
        return None


def _read_png(run: RunRecord, record: HeatMapRecord, problems: list[Problem]) -> tuple[str, str] | None:
    """The map as a data URI, and its alternative text."""
    path = run.folder / FOLDER / record.png
    try:
        content = regular(path, most=_LARGEST_PNG).read_bytes()
        if not content.startswith(_PNG):
            raise ValueError("it is not a PNG")
    except (OSError, ValueError) as error:
        problems.append(Problem(f"{run.name}/{FOLDER}/{record.png}", f"unreadable or damaged: {error}"))
        return None
    uri = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    return uri, f"{record.source}: maps for {record.class_}"
