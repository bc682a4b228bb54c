"""What `maple explain` left in run folders: heat maps, and the words near learned tokens. A damaged file is listed."""

import base64
import json
import re
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from maple.report.examples import evenly
from maple.report.records import Problem, Run
from maple.report.variants import TITLES

FOLDER = "explanation"
MOST_MAPS = 4
"""Of one run; evenly spaced along its list."""
MOST_RUNS = 4
MOST_WORD_SETS = 4
_LARGEST_PNG = 4 * 1024 * 1024
_PNG = b"\x89PNG\r\n\x1a\n"


class _Stored(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class _Map(_Stored):
    source: str
    class_: str = Field(alias="class")
    png: str = Field(pattern=r"^[0-9]{3,}_[A-Za-z0-9_-]*\.png$")


class _Maps(_Stored):
    maps: tuple[_Map, ...]


class _Distance(_Stored):
    word: str
    distance: float


class _Cosine(_Stored):
    word: str
    cosine: float


class _Token(_Stored):
    by_distance: tuple[_Distance, ...]
    by_cosine: tuple[_Cosine, ...]


class _Set(_Stored):
    class_: str | None = Field(None, alias="class")
    tokens: tuple[_Token, ...]


class _Words(_Stored):
    warning: str
    notes: tuple[str, ...] = ()
    sets: tuple[_Set, ...]


@dataclass(frozen=True)
class HeatMap:
    """A drawn map, as a data URI."""

    uri: str
    alt: str


@dataclass(frozen=True)
class WordSet:
    """Nearest words of one set of tokens; rows are (number, by distance, by cosine)."""

    title: str
    rows: tuple[tuple[int, str, str], ...]


@dataclass(frozen=True)
class Explained:
    """What is known of one run."""

    run: str
    method: str
    maps: tuple[HeatMap, ...]
    count: int
    words: tuple[WordSet, ...]
    notes: str


def explained_runs(runs: tuple[Run, ...]) -> tuple[list[Explained], list[Problem]]:
    """The first runs that were explained, and what of them cannot be read."""
    found: list[Explained] = []
    problems: list[Problem] = []
    for run in runs:
        folder = run.folder / FOLDER
        if len(found) == MOST_RUNS or not folder.is_dir():
            continue
        maps, count, wrong = _maps(folder, f"{run.name}/{FOLDER}")
        words, notes, also = _words(folder, f"{run.name}/{FOLDER}")
        problems += [*wrong, *also]
        name = str((run.settings.get("method") or {}).get("name"))
        if maps or words:
            found.append(Explained(run.name, TITLES.get(name, name), maps, count, words, notes))
    return found, problems


def _maps(folder: Path, name: str) -> tuple[tuple[HeatMap, ...], int, list[Problem]]:
    path = folder / "maps.json"
    if not path.exists():
        return (), 0, []
    try:
        listed = _Maps(**json.loads(path.read_text(encoding="utf-8"))).maps
    except (OSError, ValueError, TypeError, ValidationError) as error:
        return (), 0, [Problem(f"{name}/maps.json", f"unreadable or damaged: {_brief(error)}")]
    shown, problems = [], []
    for one in (listed[index] for index in evenly(len(listed), min(len(listed), MOST_MAPS))):
        try:
            png = _picture(folder / one.png)
        except (OSError, ValueError) as error:
            problems.append(Problem(f"{name}/{one.png}", f"unreadable or damaged: {error}"))
            continue
        uri = f"data:image/png;base64,{base64.b64encode(png).decode()}"
        shown.append(HeatMap(uri, f"{one.source}: maps for {one.class_}"))
    return tuple(shown), len(listed), problems


def _picture(path: Path) -> bytes:
    """The bytes of a PNG.

    Raises:
        OSError, ValueError: it cannot be read, or is none.
    """
    if path.stat().st_size > _LARGEST_PNG:
        raise ValueError(f"more than {_LARGEST_PNG:,} bytes")
    content = path.read_bytes()
    if not content.startswith(_PNG):
        raise ValueError("it is no PNG")
    return content


def _words(folder: Path, name: str) -> tuple[tuple[WordSet, ...], str, list[Problem]]:
    path = folder / "words.json"
    if not path.exists():
        return (), "", []
    try:
        stored = _Words(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, ValidationError) as error:
        return (), "", [Problem(f"{name}/words.json", f"unreadable or damaged: {_brief(error)}")]
    sets = tuple(
        WordSet(
            one.class_ or "",
            tuple(
                (
                    number,
                    ", ".join(f"{near.word} ({near.distance:.3f})" for near in token.by_distance),
                    ", ".join(f"{near.word} ({near.cosine:.3f})" for near in token.by_cosine),
                )
                for number, token in enumerate(one.tokens, start=1)
            ),
        )
        for one in stored.sets[:MOST_WORD_SETS]
    )
    more = len(stored.sets) - len(sets)
    cut = [f"The tokens of {more} more classes are in words.json."] if more else []
    return sets, " ".join([*stored.notes, *cut, stored.warning]), []


def _brief(error: Exception) -> str:
    return re.sub(r"\s+", " ", str(error))[:160]
