"""The files of an explanation, as reports read them.

NNN_NAME.png   picture and both maps of one picture
maps.json      "maps": for each picture its name, class, answers and values; "left_out": what could not be read
words.json     the nearest words to each learned text token
"""

import json
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePath
from typing import Any

from maple import files
from maple.errors import ConfigError
from maple.explain.drawing import draw
from maple.explain.explainer import Explanation, Side
from maple.explain.words import WARNING, LayerWords, TokenWords
from maple.inference import Unreadable

FOLDER = "explanation"
"""Where a run folder keeps them."""
MAPS, WORDS = "maps.json", "words.json"
_OURS = re.compile(r"\d{3,}_[\w-]*\.png", flags=re.ASCII)


def write_maps(
    folder: Path, results: Iterable[Explanation | Unreadable]
) -> Iterator[tuple[dict[str, Any] | Unreadable, Path | None]]:
    """Draw each picture as it comes; at the end all files take their places, and those of an earlier list go.

    What is stopped before its end leaves the folder as it was. Without any readable picture nothing is written.

    Yields:
        What maps.json says of a picture, with its PNG; or what could not be read, with None.

    Raises:
        ConfigError: the folder cannot be written.
    """
    maps: list[dict[str, Any]] = []
    left_out: list[dict[str, str]] = []
    before = {str(one.get("png")) for one in read_maps(folder)}
    with _beside(folder) as drawn:
        for result in results:
            if isinstance(result, Unreadable):
                left_out.append({"source": result.source, "reason": result.reason})
                yield result, None
                continue
            name = _file_name(len(maps) + 1, result.source)
            with _refusing(folder):
                draw(result).save(drawn / name)
            maps.append(_record(result, name))
            yield maps[-1], folder / name
        if not maps:
            return
        with _refusing(folder):
            for one in maps:
                files.move(drawn / one["png"], folder / one["png"])
            files.write_json(folder / MAPS, {"maps": maps, "left_out": left_out})
            for name in before - {one["png"] for one in maps}:
                if _OURS.fullmatch(name):
                    (folder / name).unlink(missing_ok=True)


@contextmanager
def _beside(folder: Path) -> Iterator[Path]:
    """A folder inside `folder` for what is not finished; it goes at the end, and `folder` too if nothing is in it."""
    with _refusing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        work = tempfile.TemporaryDirectory(dir=folder, prefix=".unfinished-")
    try:
        with work:
            yield Path(work.name)
    finally:
        with suppress(OSError):
            folder.rmdir()


@contextmanager
def _refusing(folder: Path) -> Iterator[None]:
    """Say that `folder` cannot be written where it cannot."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written ({error.strerror}); choose another --output") from error


def read_maps(folder: Path) -> list[dict[str, Any]]:
    """What an earlier maps.json lists; nothing where there is none, or a damaged one."""
    try:
        found = json.loads((folder / MAPS).read_text(encoding="utf-8"))["maps"]
        return [one for one in found if isinstance(one, dict)]
    except (OSError, ValueError, LookupError, TypeError):
        return []


def write_words(folder: Path, words: LayerWords) -> Path:
    """Write words.json.

    Raises:
        ConfigError: the folder cannot be written.
    """
    with _refusing(folder):
        files.write_json(folder / WORDS, words_record(words))
    return folder / WORDS


def words_record(words: LayerWords) -> dict[str, Any]:
    """What words.json holds."""
    return {
        "warning": WARNING,
        "notes": notes(words),
        "word_norm": words.word_norm,
        "sets": [
            {"class": name or None, "tokens": [_token(token) for token in tokens]}
            for name, tokens in words.sets.items()
        ],
    }


def notes(words: LayerWords) -> list[str]:
    """What else must be known to read the words."""
    found = [f"The median length of the vocabulary's embeddings is {words.word_norm:.3f}."]
    if words.deeper:
        plural = "s" if words.deeper > 1 else ""
        found.append(
            f"{words.deeper} deeper layer{plural} with tokens left out: these enter between blocks, in a space that "
            "has no words."
        )
    if words.shifted:
        found.append("Every image shifts these tokens; told is where they lie before.")
    return found


def _token(token: TokenWords) -> dict[str, Any]:
    return {
        "norm": token.norm,
        "by_distance": [{"word": one.word, "distance": one.value} for one in token.by_distance],
        "by_cosine": [{"word": one.word, "cosine": one.value} for one in token.by_cosine],
    }


def _record(explanation: Explanation, name: str) -> dict[str, Any]:
    def side(one: Side) -> dict[str, Any]:
        best = [{"class": ranked.name, "probability": ranked.probability} for ranked in one.best]
        return {"best": best, "probability": one.probability, "values": [list(row) for row in one.values]}

    return {
        "source": explanation.source,
        "class": explanation.target,
        "png": name,
        "zero_shot": side(explanation.zero_shot),
        "trained": side(explanation.tuned),
    }


def _file_name(number: int, source: str) -> str:
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", PurePath(source).stem).strip("-")[:40]
    return f"{number:03}_{stem or 'picture'}.png"
