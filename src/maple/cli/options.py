"""Options and arguments that several commands share, and the parsing of their values."""

import os
import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from maple.descriptions import ALL_SHOTS
from maple.errors import ConfigError, visible
from maple.files import read_json
from maple.names import is_features

LAST = "last"
"""The name of the newest finished run, wherever a run is named."""
_RUNS = Path("runs")


def newest_run(value: Any) -> Any:
    """Return the folder of the newest finished run in runs/ for `last`, and any other value as it is.

    The newest is the one that was started last, as its environment.json says. Runs inside the folder of another one,
    which `maple fit` compares, do not count.

    Raises:
        ConfigError: there is no finished run.
    """
    if str(value) != LAST:
        return value
    runs = []
    for folder, below, names in os.walk(_RUNS):
        if "config.json" in names:
            below.clear()
            if "prompts.safetensors" in names:
                runs.append(Path(folder))
    if not runs:
        raise ConfigError(
            "last: there is no finished run in runs/ of the current folder; train one, or give the folder of a run "
            "(./last for one that is called last)"
        )
    newest = max(runs, key=_started)
    typer.echo(visible(f"maple: last is {newest}"), err=True)
    return type(value)(newest)


def _started(run: Path) -> tuple[float, float]:
    """When a run was started, and when its result was written, in seconds; the latter twice if nothing is recorded."""
    from maple.runs.folder import start_of

    written, started = (run / "prompts.safetensors").stat().st_mtime, start_of(run)
    return written if started is None else started, written


Features = Annotated[
    str | None,
    Option(
        metavar="FILES",
        help="Precomputed features in place of images and of a CLIP: one or more .safetensors files, separated by "
        "commas.",
    ),
]
PrintConfig = Annotated[bool, Option("--print-config", help="Print the settings as TOML, for --preset, and stop.")]
Device = Annotated[
    str | None,
    Option(help="Where to compute: cpu, cuda, cuda:1, mps. Default: a CUDA GPU if there is one; for exports the CPU."),
]
DataRoot = Annotated[str | None, Option(envvar="MAPLE_DATA", help="The folder with the folders of the data sets.")]
Tracker = Annotated[str | None, Option(help="Also log to an experiment tracker: tensorboard, wandb or mlflow.")]
Backbone = Annotated[
    str | None,
    Option(
        help="An open_clip architecture, hf-hub:OWNER/NAME, a folder, or a file. Default: maple-small (included) for "
        "emoji and icons, otherwise OpenAI's ViT-B-16, downloaded on first use."
    ),
]
Pretrained = Annotated[
    str | None,
    Option(help="For an architecture: an open_clip tag, a file, or random[:SEED]; for a file: quickgelu or gelu."),
]
TrainedBackbone = Annotated[
    str | None,
    Option("--backbone", help="The CLIP of the run, where it is not stored where the run says; it must be the same."),
]
TrustBackbone = Annotated[
    bool, Option("--trust-backbone", help="Load whatever CLIP the run names, and remember it, if the run is not yours.")
]
TrustCode = Annotated[
    bool, Option("--trust-code", help="Run the file next to the prompts that defines their method, if it is not yours.")
]
MeasuredBackbone = Annotated[str, Option("--backbone", help="The CLIP to measure; by default with random weights.")]
Precision = Annotated[str | None, Option(help="fp32, bf16 or fp16; prompts are always fp32.")]
MethodName = Annotated[str | None, Option("--method", help="One of `maple methods`, or your own: PATH/FILE.py:CLASS.")]
Methods = Annotated[
    str | None, Option(help='"zero_shot,coop,maple": first parts of preset names, TOML files, PATH/FILE.py:CLASS.')
]
Shots = Annotated[str | None, Option(help="Training images per class, or `all`.")]
Seed = Annotated[int | None, Option(help="The seed of the sample, the initial prompts and the order of images.")]
Overrides = Annotated[list[str] | None, Option("--set", help="Override any setting: section.key=value; repeatable.")]
ClassNamesFile = Annotated[
    Path | None,
    Option("--class-names", help='A JSON file of other class names: {"n02123045": "tabby cat"}.', dir_okay=False),
]
RunOutput = Annotated[
    Path | None, Option("--output", help="The run folder. Default: a name derived from the settings, in runs/.")
]
RunFolder = Annotated[
    Path,
    Argument(metavar="RUN", help="A run folder, or `last`: the newest finished run in runs/.", callback=newest_run),
]
TrainedModel = Annotated[
    str,
    Argument(metavar="RUN", help="A run folder, `last`, a prompts file, or hub:OWNER/NAME.", callback=newest_run),
]
AnyModel = Annotated[
    str,
    Argument(
        metavar="RUN", help="A run, `last`, a prompts file, hub:OWNER/NAME, or an ONNX export.", callback=newest_run
    ),
]
ImageSources = Annotated[
    list[str] | None,
    Argument(
        metavar="IMAGES...",
        help="Image files, folders, archives, Parquet, shards, hf:NAME, http(s) addresses, or - for standard input.",
    ),
]
ClassNames = Annotated[
    str | None,
    Option("--classes", help='Any class names: "red car,blue car"; quote one with a comma. Default: the trained ones.'),
]
Draft = Annotated[
    bool,
    Option("--draft", help="Decode large JPEGs at a half, quarter or eighth of their size: faster, nearly the same."),
]
Recursive = Annotated[bool, Option("--recursive", help="Search the subfolders of a folder, too.")]
AsJson = Annotated[bool, Option("--json", help="Print JSON; where there are several objects, one per line.")]

_MOST_NUMBERS = 10_000


def comma_list(text: str | None) -> list[str] | None:
    """Split "a, b" at the commas; None stays None."""
    return None if text is None else [part.strip() for part in text.split(",")]


def number_list(text: str | None, option: str) -> list[int] | None:
    """Parse whole numbers and ranges such as "1-3", separated by commas; None stays None."""
    if text is None:
        return None
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = (piece.strip() for piece in part.partition("-"))
        if not first.isdecimal() or (dash and (not last.isdecimal() or int(last) < int(first))):
            raise ConfigError(f"{option} {text!r}: {part!r} must be a whole number, or a range such as 1-3")
        part_numbers = range(int(first), int(last if dash else first) + 1)
        if len(part_numbers) > _MOST_NUMBERS:
            raise ConfigError(
                f"{option} {text!r}: {part!r} are {len(part_numbers):,} numbers; give at most {_MOST_NUMBERS:,}"
            )
        numbers += part_numbers
    return numbers


def parse_shots(text: str) -> int | None:
    """Parse a number of training images per class; None for "all"."""
    if text == ALL_SHOTS:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"--shots {text!r} must be a whole number from 1, or all")
    return int(text)


def read_names_file(path: Path | None) -> dict[str, str] | None:
    """Read a JSON object of strings, each key once; None without a file."""
    if path is None:
        return None

    content: dict[str, Any] = read_json(path, error=ConfigError)
    if not all(isinstance(value, str) for value in content.values()):
        raise ConfigError(f'{path} must hold a JSON object of strings, as in {{"n02123045": "tabby cat"}}')
    return content


def run_folder(output: Path | None, default: Path) -> Path:
    """Return the folder of a run: `--output`, which must not be the current folder, or the default."""
    if output is not None and str(output) == ".":
        raise ConfigError("--output names the current folder; give a folder of its own, as in --output runs/first")
    return output or default


def load_arguments(
    backbone: str | None, pretrained: str | None, trust_backbone: bool, trust_code: bool
) -> dict[str, Any]:
    """The options by which a trained run is loaded, as `load_prompts` takes them."""
    trust = {"trust_backbone": trust_backbone, "trust_code": trust_code}
    return {"backbone": backbone, "pretrained": pretrained, **trust}


def method_name(text: str) -> str:
    """The name of a method that the user gives; a file of one, PATH/FILE.py:CLASS, is accepted by naming it."""
    from maple.plugins import trust_code

    return trust_code(text)


def method_names(text: str | None) -> list[str] | None:
    """`method_name` of each in "a, b"; None stays None."""
    return None if text is None else [method_name(name) for name in comma_list(text) or []]


def needs_no_weights(backbone: str, pretrained: str | None) -> str | None:
    """Return the weights of a CLIP that is only measured: random ones, for the name of an architecture."""
    architecture = "/" not in backbone and backbone != "maple-small" and not Path(backbone).exists()
    return "random" if pretrained is None and architecture else pretrained


def print_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    title: str = "",
    right: Collection[str] = (),
    soft_wrap: bool = False,
) -> None:
    """Print a table; its cells are text without markup."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(visible(title)) if title else None, title_justify="left", pad_edge=not soft_wrap)
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left")
    for row in rows:
        table.add_row(*(Text(visible(str(cell))) for cell in row))
    Console(soft_wrap=soft_wrap).print(table)


def echo(text: object = "", *, err: bool = False) -> None:
    """Print text for people: class names, paths and messages of others cannot control the terminal."""
    typer.echo(visible_lines(str(text).split("\n")), err=err)


_KEYWORDS = r"backbone|dataset|format|int8|method|only|part|pretrained|recursive|root|trust_\w+|zero_shot"
_KEYWORD = re.compile(rf"(?<![^\s(])({_KEYWORDS})=(True|PATH/FILE\.py:CLASS|[A-Z]+|all|onnx|openclip)\b")
_SETTING = re.compile(r"(?<![^\s(])((?:method|train|backbone)\.[a-z_]+=)")


def in_options(message: str) -> str:
    """A message of the package, which names arguments as Python programs give them, with the command line's options.

    Example:
        >>> in_options("name your own copy with backbone=PATH, and train.lr=0.001")
        'name your own copy with --backbone PATH, and --set train.lr=0.001'
    """

    def option(match: re.Match[str]) -> str:
        name = {"root": "data-root"}.get(match[1], match[1].replace("_", "-"))
        return f"--{name}" if match[2] == "True" else f"--{name} {match[2]}"

    message = _SETTING.sub(r"--set \1", _KEYWORD.sub(option, message))
    return message.replace("choose another output", "choose another --output")


def visible_lines(lines: Iterable[str]) -> str:
    """Join lines of text, with control characters escaped."""
    return "\n".join(map(visible, lines))


def echo_note(text: str | None) -> None:
    """Print a note on standard error, if there is one."""
    if text is not None:
        typer.echo(visible(f"maple: note: {text.replace('with zero-shot CLIP', 'with --zero-shot')}"), err=True)


def exit_status(read: int, unreadable: int) -> int:
    """Return 0 if all images were read, 1 if some were not, 2 if none was."""
    return 0 if not unreadable else 1 if read else 2


def feature_files(text: str) -> str:
    """The name of the data set that --features gives; ConfigError if a file cannot be one of features."""
    if not is_features(text):
        raise ConfigError(f"--features {text!r}: give .safetensors files, separated by commas")
    return text
