"""What `maple explain` left in run folders: heat maps, and the words near learned tokens. A damaged file is listed."""

import base64
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import Field, ValidationError

from maple.descriptions import MethodDescription
from maple.report.predictions import evenly
from maple.report.records import Collection, Problem, RunRecord, Stored, read_stored, reason_of

FOLDER = "explanation"
_MOST_RUNS = 4
_MOST_MAPS = 4  # of one run, evenly spaced along its list
_MOST_WORD_SETS = 4
_LARGEST_PNG = 4 * 1024 * 1024
_PNG = b"\x89PNG\r\n\x1a\n"


class _Map(Stored):
    source: str
    class_: str = Field(alias="class")
    png: str = Field(pattern=r"^[0-9]{3,}_[A-Za-z0-9_-]*\.png$")


class _Maps(Stored):
    maps: tuple[_Map, ...]


class _Distance(Stored):
    word: str
    distance: float


class _Cosine(Stored):
    word: str
    cosine: float


class _Token(Stored):
    by_distance: tuple[_Distance, ...]
    by_cosine: tuple[_Cosine, ...]


class _TokenSet(Stored):
    class_: str | None = Field(None, alias="class")
    tokens: tuple[_Token, ...]


class _Words(Stored):
    warning: str
    notes: tuple[str, ...] = ()
    sets: tuple[_TokenSet, ...]


File = TypeVar("File", bound=Stored)


@dataclass(frozen=True)
class HeatMap:
    """A heat map drawn over its image, as a data URI."""

    uri: str
    alt: str


@dataclass(frozen=True)
class NearestWords:
    """Nearest words of one set of tokens; rows are (number, by distance, by cosine)."""

    title: str
    rows: tuple[tuple[int, str, str], ...]


@dataclass(frozen=True)
class ExplainedRun:
    """The explanations of one run; `count` is how many maps it has, of which a few are shown."""

    run: str
    method: str
    maps: tuple[HeatMap, ...]
    count: int
    words: tuple[NearestWords, ...]
    notes: str


def explained_runs(collection: Collection, problems: list[Problem]) -> list[ExplainedRun]:
    """The first runs that were explained; damaged files are appended to `problems`."""
    explained: list[ExplainedRun] = []
    for run in collection.runs:
        if len(explained) == _MOST_RUNS or not (run.folder / FOLDER).is_dir():
            continue
        maps, count = _read_maps(run, problems)
        words, notes = _read_words(run, problems)
        name = str((run.settings.get("method") or {}).get("name"))
        title = collection.methods.get(name, MethodDescription(name)).title
        if maps or words:
            explained.append(ExplainedRun(run.name, title, maps, count, words, notes))
    return explained


def _read(run: RunRecord, name: str, kind: type[File], problems: list[Problem]) -> File | None:
    path, place = run.folder / FOLDER / name, f"{run.name}/{FOLDER}/{name}"
    content = read_stored(path, place, problems) if path.exists() else None
    try:
        return None if content is None else kind(**content)
    except (ValidationError, TypeError) as error:
        problems.append(Problem(place, f"unreadable or damaged: {reason_of(error)}"))
        return None


def _read_maps(run: RunRecord, problems: list[Problem]) -> tuple[tuple[HeatMap, ...], int]:
    stored = _read(run, "maps.json", _Maps, problems)
    maps = stored.maps if stored else ()
    shown = []
    for index in evenly(len(maps), min(len(maps), _MOST_MAPS)):
        try:
            png = _read_png(run.folder / FOLDER / maps[index].png)
        except (OSError, ValueError) as error:
            place = f"{run.name}/{FOLDER}/{maps[index].png}"
            problems.append(Problem(place, f"unreadable or damaged: {error}"))
            continue
        uri = f"data:image/png;base64,{base64.b64encode(png).decode()}"
        shown.append(HeatMap(uri, f"{maps[index].source}: maps for {maps[index].class_}"))
    return tuple(shown), len(maps)


def _read_png(path: Path) -> bytes:
    if path.stat().st_size > _LARGEST_PNG:
        raise ValueError(f"more than {_LARGEST_PNG:,} bytes")
    content = path.read_bytes()
    if not content.startswith(_PNG):
        raise ValueError("it is not a PNG")
    return content


def _read_words(run: RunRecord, problems: list[Problem]) -> tuple[tuple[NearestWords, ...], str]:
    stored = _read(run, "words.json", _Words, problems)
    if stored is None:
        return (), ""
    sets = []
    for one in stored.sets[:_MOST_WORD_SETS]:
        rows = []
        for number, token in enumerate(one.tokens, start=1):
            by_distance = ", ".join(f"{near.word} ({near.distance:.3f})" for near in token.by_distance)
            by_cosine = ", ".join(f"{near.word} ({near.cosine:.3f})" for near in token.by_cosine)
            rows.append((number, by_distance, by_cosine))
        sets.append(NearestWords(one.class_ or "", tuple(rows)))
    more = len(stored.sets) - len(sets)
    cut = [f"The tokens of {more} more classes are in words.json."] if more else []
    return tuple(sets), " ".join([*stored.notes, *cut, stored.warning])
