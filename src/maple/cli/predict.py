"""`maple predict`."""

import csv
import io
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.cells import cell_len

from maple.cli.options import Device
from maple.errors import visible
from maple.names import names_in

if TYPE_CHECKING:
    from maple.inference import ImageSource, Prediction, Ranked, Unreadable

_BAR = 20


def predict_command(
    run: Annotated[
        str,
        typer.Argument(metavar="RUN", help="A run folder, a prompts file, hf-hub:OWNER/NAME, or an export to ONNX."),
    ],
    sources: Annotated[
        list[str],
        typer.Argument(metavar="SOURCE...", help="Image files, folders, http(s) addresses, or - for standard input."),
    ],
    classes: Annotated[
        str | None,
        typer.Option(
            help='Class names, new ones too: "red car,blue car"; one with a comma in double quotes. Default: the '
            "trained ones."
        ),
    ] = None,
    ask: Annotated[
        bool, typer.Option("--ask", help="Ask for class names again and again, and answer each time.")
    ] = False,
    top: Annotated[int, typer.Option(help="How many classes to show for a picture.", min=1)] = 5,
    zero_shot: Annotated[bool, typer.Option("--zero-shot", help="Show the frozen CLIP's answer beside.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object for each picture, a line each.")
    ] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV: one line for each picture and class.")] = False,
    recursive: Annotated[bool, typer.Option("--recursive", help="Look into the folders of a folder too.")] = False,
    batch_size: Annotated[int, typer.Option(help="How many pictures are computed at once.", min=1)] = 32,
    device: Device = None,
) -> None:
    """Say what pictures show. Class names that were never trained work at once.

    Pictures come in the order of their names. Unreadable ones are told and left out.

    Exit status: 0 all were read, 1 some were not, 2 none was, or wrong use.
    """
    from maple.errors import ClassNamesError, ConfigError
    from maple.inference import STDIN, find_images, keep_fetched, load_predictor

    if as_json and as_csv:
        raise ConfigError("--json and --csv exclude each other; choose one")
    if ask and STDIN in sources:
        raise ConfigError("--ask reads class names from standard input, so the picture cannot come from there too")
    # Malformed sources are refused before a backbone is loaded.
    pictures = find_images(sources, recursive=recursive, stdin=getattr(sys.stdin, "buffer", None))
    predictor = load_predictor(run, zero_shot=zero_shot, device=device)
    if classes is not None:
        _warn(predictor.set_class_names(names_in(classes)))
    show = _show_json if as_json else _CsvLines(zero_shot) if as_csv else _Listing()
    tally = _Tally(show)

    def answer(found: "Iterable[ImageSource]") -> None:
        tally.count(predictor.stream(found, top=top, batch_size=batch_size, workers=min(4, os.cpu_count() or 1)))

    if ask:
        kept = list(keep_fetched(pictures))
        if classes is not None:
            answer(kept)
        for line in _asked():
            try:
                _warn(predictor.set_class_names(names_in(line)))
            except ClassNamesError as error:
                typer.echo(visible(f"maple: {error}"), err=True)
            else:
                answer(kept)
    else:
        answer(pictures)
    raise typer.Exit(tally.status)


def _asked() -> Iterator[str]:
    """Lists of class names, typed on the terminal, until an empty line or the end of the input."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    while True:
        typer.echo("class names, with commas; empty line ends: ", nl=False, err=True)
        line = sys.stdin.readline()
        if not line:
            typer.echo(err=True)
        if not line.strip():
            return
        yield line.strip()


def _warn(line: str | None) -> None:
    if line is not None:
        typer.echo(visible(f"maple: note: {line}"), err=True)


class _Tally:
    """Shows answers, tells what was unreadable, and knows the exit status that follows from both."""

    def __init__(self, show: "Callable[[Prediction], None]") -> None:
        self._show = show
        self._answered = 0
        self._failed = 0

    def count(self, results: "Iterable[Prediction | Unreadable]") -> None:
        from maple.inference import Unreadable

        for result in results:
            if isinstance(result, Unreadable):
                self._failed += 1
                typer.echo(visible(f"maple: {result.reason}"), err=True)
            else:
                self._answered += 1
                self._show(result)

    @property
    def status(self) -> int:
        if not self._failed:
            return 0
        return 1 if self._answered else 2


def _show_json(answer: "Prediction") -> None:
    def listed(ranked: "tuple[Ranked, ...]") -> list[dict[str, Any]]:
        return [{"class": one.name, "probability": one.probability} for one in ranked]

    row: dict[str, Any] = {"source": answer.source, "best": listed(answer.best)}
    if answer.zero_shot is not None:
        row["zero_shot"] = listed(answer.zero_shot)
    typer.echo(json.dumps(row))


class _CsvLines:
    """A header, then one line for each picture and class."""

    def __init__(self, zero_shot: bool) -> None:
        self._write([*("source", "rank", "class", "probability"), *(["zero_shot_probability"] if zero_shot else [])])

    def __call__(self, answer: "Prediction") -> None:
        for rank, one in enumerate(answer.best):
            beside = [] if answer.zero_shot_of_best is None else [answer.zero_shot_of_best[rank]]
            self._write([answer.source, rank + 1, one.name, one.probability, *beside])

    @staticmethod
    def _write(values: list[Any]) -> None:
        buffer = io.StringIO()
        csv.writer(buffer, lineterminator="\n").writerow(values)
        typer.echo(buffer.getvalue(), nl=False)


class _Listing:
    """For people: percentages and bars, those of zero-shot CLIP beside."""

    def __init__(self) -> None:
        self._block = "█" if _can_show("█") else "#"

    def __call__(self, answer: "Prediction") -> None:
        beside = answer.zero_shot_of_best
        names = [visible(one.name) for one in answer.best]
        width = max(map(cell_len, names))
        lines = [
            f"  {_padded(name, width)}  {self._bar(one.probability)}"
            + ("" if beside is None else f"  {self._bar(beside[rank])}")
            for rank, (name, one) in enumerate(zip(names, answer.best, strict=True))
        ]
        typer.echo(visible(answer.source))
        if answer.zero_shot is not None:
            first = answer.zero_shot[0]
            typer.echo(f"  {_padded('', width)}  {_padded('trained', 9 + _BAR)}  zero-shot")
            same = first.name == answer.best[0].name
            lines += [] if same else [f"  zero-shot CLIP says {visible(first.name)}, {100 * first.probability:.1f} %"]
        for line in lines:
            typer.echo(line.rstrip())

    def _bar(self, probability: float) -> str:
        return f"{100 * probability:5.1f} %  {_padded(self._block * round(_BAR * probability), _BAR)}"


def _padded(text: str, width: int) -> str:
    """Text filled with spaces to a width in columns of the terminal, where some characters take two."""
    return text + " " * (width - cell_len(text))


def _can_show(text: str) -> bool:
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True
