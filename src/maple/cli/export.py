"""`maple export`."""

from pathlib import Path
from typing import Annotated

import typer

from maple.cli.options import DataRoot


def export_command(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder, a prompts file, or hf-hub:OWNER/NAME.")],
    output: Annotated[Path, typer.Option(help="The folder to make.")],
    format: Annotated[
        str, typer.Option(help="onnx, torchscript, openclip or transformers; `maple predict` reads onnx.")
    ] = "onnx",
    zero_shot: Annotated[bool, typer.Option("--zero-shot", help="onnx: include the frozen CLIP.")] = False,
    int8: Annotated[bool, typer.Option("--int8", help="onnx: 8-bit weights; smaller, and not exact.")] = False,
    data_root: DataRoot = None,
) -> None:
    """Write a trained method for other programs, and check that it computes the same."""
    from maple.export import export_run

    written = export_run(run, output, format, zero_shot=zero_shot, int8=int8, data_root=data_root)
    images = "random images" if not written.images else f"random images and {written.images} of the run's"
    typer.echo(f"{written.folder}: {written.bytes / 1e6:,.1f} MB")
    typer.echo(f"largest difference of logits from PyTorch: {written.difference:.2g} ({images})")
    if written.new_names is not None:
        typer.echo(f"maple: note: it answers for the trained class names only: {written.new_names}", err=True)
