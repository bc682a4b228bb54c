"""Predictions as tables: one row for each image, in Parquet, CSV or JSON Lines.

The columns are source (which image of which file), path (what a table calls it; otherwise the source), classes and
probabilities (best first), those of zero-shot CLIP and `rejected` where they were requested, and `error`: empty unless
the image could not be read.
"""

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any

from maple import files
from maple.errors import ConfigError, output_error
from maple.inference.predictor import Prediction, UnreadableImage
from maple.names import escape_lone_surrogates

SUFFIXES = (".parquet", ".csv", ".jsonl")
_ROWS_AT_ONCE = 1000


def to_row(result: Prediction | UnreadableImage) -> dict[str, Any]:
    """Return the row of an image: what was not requested, or not known of an unreadable one, is None.

    Example:
        >>> to_row(next(predictor.stream(find_images(["cat.jpg"]), top=2)))["classes"]
        ['cat', 'dog']
    """
    row: dict[str, Any] = {"source": result.source, "path": result.source, "classes": None, "probabilities": None}
    row |= {"zero_shot_classes": None, "zero_shot_probabilities": None, "rejected": None, "error": None}
    if isinstance(result, UnreadableImage):
        return row | {"error": result.reason}
    for prefix, ranked in (("", result.best), ("zero_shot_", result.zero_shot)):
        if ranked is not None:
            row[f"{prefix}classes"] = [item.name for item in ranked]
            row[f"{prefix}probabilities"] = [item.probability for item in ranked]
    return row | {"rejected": result.rejected}


def arrow_schema(*, zero_shot: bool, reject: bool) -> Any:
    """Return the Arrow schema of rows, with the columns that were requested."""
    import pyarrow as pa

    names, numbers = pa.list_(pa.string()), pa.list_(pa.float32())
    return pa.schema(
        [
            *(("source", pa.string()), ("path", pa.string()), ("classes", names), ("probabilities", numbers)),
            *([("zero_shot_classes", names), ("zero_shot_probabilities", numbers)] if zero_shot else []),
            *([("rejected", pa.bool_())] if reject else []),
            ("error", pa.string()),
        ]
    )


def arrow_table(rows: Iterable[Mapping[str, Any]], schema: Any) -> Any:
    """Return rows as an Arrow table; lone surrogates, which Arrow's text cannot hold, are escaped as in CSV."""
    import pyarrow as pa

    def escaped(value: Any) -> Any:
        if isinstance(value, list):
            return [escaped(each) for each in value]
        return escape_lone_surrogates(value) if isinstance(value, str) else value

    return pa.Table.from_pylist([{name: escaped(value) for name, value in row.items()} for row in rows], schema=schema)


def check_output(path: Path) -> None:
    """Refuse a file of predictions that cannot be written, before anything is computed.

    Raises:
        ConfigError: another suffix than .parquet, .csv or .jsonl, or it exists already.
        DataError: it is Parquet, and pyarrow is not installed.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"output {str(path)!r}: predictions are written to a file named {', '.join(SUFFIXES)}")
    if path.exists():
        raise output_error(f"{path} exists", ", or remove it")
    if path.suffix.lower() == ".parquet":
        # Every prediction imports this module; the readers of tables only those that write Parquet.
        from maple.data.sources.tables import require_pyarrow

        require_pyarrow(f"output {str(path)!r}")


def write_predictions(
    path: Path,
    results: Iterable[Prediction | UnreadableImage],
    *,
    top: int,
    zero_shot: bool = False,
    reject: bool = False,
) -> Iterator[Prediction | UnreadableImage]:
    """Write results to a file as they come, and yield each; the file is there once all of them are written.

    CSV has the columns class_1, probability_1 and so on up to `top`, the other formats have lists.

    Raises:
        ConfigError: as `check_output`, or the file cannot be written.

    Example:
        >>> results = predictor.stream(find_images(["photos"]))
        >>> unreadable = sum(isinstance(r, UnreadableImage) for r in write_predictions(Path("out.csv"), results, top=5))
    """
    check_output(path)
    with files.output_errors(path), files.replacing(path) as temporary, ExitStack() as stack:
        kind = path.suffix.lower()
        if kind == ".parquet":
            write = stack.enter_context(_parquet_writer(temporary, arrow_schema(zero_shot=zero_shot, reject=reject)))
        else:
            file = stack.enter_context(open(temporary, "w", encoding="utf-8", newline="", errors="backslashreplace"))
            kinds = ["", *(["zero_shot_"] if zero_shot else [])]
            write = _csv_writer(file, top, kinds, reject) if kind == ".csv" else _json_writer(file, kinds, reject)
        iterator = iter(results)
        while batch := list(islice(iterator, _ROWS_AT_ONCE)):
            write([to_row(result) for result in batch])
            yield from batch


Write = Callable[[list[dict[str, Any]]], object]


@contextmanager
def _parquet_writer(path: Path, schema: Any) -> Iterator[Write]:
    import pyarrow.parquet as pq

    with pq.ParquetWriter(path, schema) as writer:
        yield lambda rows: writer.write_table(arrow_table(rows, schema))


def _json_writer(file: Any, kinds: list[str], reject: bool) -> Write:
    columns = ["source", "path", *(f"{kind}{part}" for kind in kinds for part in ("classes", "probabilities"))]
    columns += [*(["rejected"] if reject else []), "error"]
    return lambda rows: file.writelines(json.dumps({name: row[name] for name in columns}) + "\n" for row in rows)


def _csv_writer(file: Any, top: int, kinds: list[str], reject: bool) -> Write:
    ranks = range(1, top + 1)
    ranked = [f"{kind}{part}_{rank}" for kind in kinds for rank in ranks for part in ("class", "probability")]
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["source", "path", *ranked, *(["rejected"] if reject else []), "error"])

    def cells(row: dict[str, Any]) -> Iterator[Any]:
        yield from (row["source"], row["path"])
        for kind in kinds:
            pairs = zip(row[f"{kind}classes"] or (), row[f"{kind}probabilities"] or (), strict=True)
            values = list(chain.from_iterable(pairs))
            yield from [*values, *[None] * (2 * top - len(values))]
        if reject:
            yield None if row["rejected"] is None else str(row["rejected"]).lower()
        yield row["error"]

    return lambda rows: writer.writerows(map(cells, rows))
