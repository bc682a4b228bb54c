"""The `maple` command. Each module parses options, calls the package and prints; heavy imports wait for a command."""

import errno
import io
import os
import sys
import warnings
from typing import Any

import typer
from typer.core import TyperGroup

from maple import __version__
from maple.cli import options
from maple.cli.backbones import backbones_command
from maple.cli.cache import cache_app
from maple.cli.data import data_app
from maple.cli.doctor import doctor_command
from maple.cli.evaluate import evaluate_command
from maple.cli.exchange import export_command, gallery_command, import_command, push_command
from maple.cli.explain import explain_command
from maple.cli.predict import predict_command
from maple.cli.report import efficiency_command, report_command
from maple.cli.serve import serve_command
from maple.cli.show import inspect_command, methods_command
from maple.cli.sweep import sweep_command
from maple.cli.train import fit_command, train_command
from maple.errors import ConfigError, MapleError

# Packages that are not needed to run exported methods, and may not be installed.
_OPTIONAL = {
    *("torch", "torchvision", "open_clip", "accelerate", "safetensors", "huggingface_hub", "filelock", "fsspec"),
    "transformers",
}
_RESUME = {
    "train": "; repeat the command to resume after the last finished epoch",
    "fit": "; repeat the command to resume where it stopped",
    "sweep": "; repeat the command to resume it; finished runs are kept",
}
# Errors of the user's disk or permissions, wherever they occur.
_DISK_ERRORS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EMFILE),
    *(errno.ENFILE, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP),
}


class _Commands(TyperGroup):
    """The commands; an interruption is reported with how to resume (Typer would only print "Aborted")."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo(f"maple: interrupted{_RESUME.get(ctx.invoked_subcommand, '')}", err=True)
            ctx.exit(130)


app = typer.Typer(
    cls=_Commands,
    name="maple",
    help="Adapt CLIP to your images from a handful of examples, by multi-modal prompt learning.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("fit")(fit_command)
app.command("train")(train_command)
app.command("sweep")(sweep_command)
app.command("evaluate")(evaluate_command)
app.command("predict")(predict_command)
app.command("explain")(explain_command)
app.command("serve")(serve_command)
app.command("export")(export_command)
app.command("import")(import_command)
app.command("push")(push_command)
app.command("gallery")(gallery_command)
app.command("methods")(methods_command)
app.command("backbones")(backbones_command)
app.command("inspect")(inspect_command)
app.add_typer(data_app)
app.add_typer(cache_app)
app.command("doctor")(doctor_command)
app.command("efficiency")(efficiency_command)
app.command("report")(report_command)


def _show_version(requested: bool) -> None:
    if requested:
        typer.echo(f"maple {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_show_version, is_eager=True, help="Print the version."),
) -> None:
    del version


def main() -> None:
    """Run the command line; an error that maple raises on purpose is one line, not a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # File names may contain characters that the terminal cannot encode: print their codes instead of failing.
            stream.reconfigure(errors="backslashreplace")
    warnings.filterwarnings("ignore", module=r"PIL\.")  # of damaged metadata, which are not used
    try:
        try:
            os.getcwd()
        except FileNotFoundError:
            raise ConfigError("the working folder has been deleted; change to another folder") from None
        app()
    except MapleError as error:
        typer.echo(options.visible_lines(options.in_options(f"maple: {error}").split("\n")), err=True)
        sys.exit(2)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _OPTIONAL:
            raise
        typer.echo(
            f"maple: this needs {error.name}, which is not installed: install maple-clip with its dependencies. "
            "Without it, `maple predict` can use a folder written by `maple export --format onnx`",
            err=True,
        )
        sys.exit(2)
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        typer.echo(f"maple: {error.filename or 'a file'}: {error.strerror}", err=True)
        sys.exit(2)
