"""The files of an explanation, which reports read.

NNN_NAME.png   an image and both of its heat maps
maps.json      "maps": the name, class, predictions and values of each image; "left_out": the unreadable ones
words.json     the words nearest to each learned text token (see `maple.explain.words`)
"""

import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePath
from typing import Any

from maple import files
from maple.errors import ConfigError, MapleError
from maple.explain.drawing import draw
from maple.explain.explainer import ExplainedSide, Explanation
from maple.inference import UnreadableImage
from maple.inference.predictor import classes_to_json

FOLDER = "explanation"
"""The folder of an explanation in a run's."""
MAPS = "maps.json"
_WRITTEN_NAME = re.compile(r"\d{3,}_[\w-]*\.png", flags=re.ASCII)


def write_maps(
    folder: Path, results: Iterable[Explanation | UnreadableImage]
) -> Iterator[tuple[dict[str, Any] | UnreadableImage, Path | None]]:
    """Draw each explanation as it comes; at the end, move all files into the folder and remove those of earlier maps.

    If the iteration is stopped early, the folder stays as it was. Without a readable image nothing is written.

    Yields:
        The entry of an image in maps.json, with its PNG; or an image that could not be read, with None.

    Raises:
        ConfigError: the folder cannot be written.

    Example:
        >>> for entry, png in write_maps(Path("maps"), explainer.explain(find_images(["photos"]))):
        ...     print(png)
    """
    maps: list[dict[str, Any]] = []
    left_out: list[dict[str, str]] = []
    earlier = {str(entry.get("png")) for entry in read_maps(folder)}
    with _work_folder(folder) as work:
        for result in results:
            if isinstance(result, UnreadableImage):
                left_out.append({"source": result.source, "reason": result.reason})
                yield result, None
                continue
            stem = re.sub(r"[^A-Za-z0-9_-]+", "-", PurePath(result.source).stem).strip("-")[:40]
            name = f"{len(maps) + 1:03}_{stem or 'image'}.png"
            with writing_to(folder):
                draw(result).save(work / name)
            entry = {"source": result.source, "class": result.target, "png": name}
            maps.append(
                {**entry, "zero_shot": _side_to_json(result.zero_shot), "trained": _side_to_json(result.trained)}
            )
            yield maps[-1], folder / name
        if not maps:
            return
        with writing_to(folder):
            for entry in maps:
                files.move(work / entry["png"], folder / entry["png"])
            files.write_json(folder / MAPS, {"maps": maps, "left_out": left_out})
            for name in earlier - {entry["png"] for entry in maps}:
                # A damaged maps.json must not name other files for removal.
                if _WRITTEN_NAME.fullmatch(name):
                    (folder / name).unlink(missing_ok=True)


def read_maps(folder: Path) -> list[dict[str, Any]]:
    """Return the entries of an earlier maps.json; none where there is no such file, or a damaged one.

    Example:
        >>> [entry["png"] for entry in read_maps(Path("runs/pets/explanation"))]
        ['001_cat.png']
    """
    with suppress(MapleError):
        maps: Any = files.read_json(folder / MAPS).get("maps")
        return [entry for entry in maps if isinstance(entry, dict)] if isinstance(maps, list) else []
    return []


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Turn an OSError into a ConfigError about `folder`."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written ({error.strerror}); choose another --output") from error


@contextmanager
def _work_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder inside `folder`; an empty `folder` is removed with it."""
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        work = tempfile.TemporaryDirectory(dir=folder, prefix=".unfinished-")
    try:
        with work:
            yield Path(work.name)
    finally:
        with suppress(OSError):
            folder.rmdir()


def _side_to_json(side: ExplainedSide) -> dict[str, Any]:
    values = [list(row) for row in side.values]
    return {"best": classes_to_json(side.best), "probability": side.probability, "values": values}
