"""`maple import`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from maple.cli.options import DataRoot
from maple.names import names_in


def import_command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A model.pth.tar-N of the reference code.")],
    dataset: Annotated[str | None, typer.Option(help="What it was trained on: gives the class names.")] = None,
    data_root: DataRoot = None,
    classes: Annotated[str, typer.Option(help="The part of the classes it was trained on: all, base, novel.")] = "base",
    names: Annotated[str | None, typer.Option(help='Instead of --dataset: the class names, "cat,dog".')] = None,
    method: Annotated[
        str | None, typer.Option(help="Which method it is, where its keys fit several; else it is recognised.")
    ] = None,
    init_text: Annotated[str, typer.Option(help="The words that its sentences began with.")] = "a photo of a",
    backbone: Annotated[str, typer.Option(help="The CLIP it was trained on.")] = "ViT-B-16",
    pretrained: Annotated[str | None, typer.Option(help="For an architecture: tag, file, or random[:SEED].")] = None,
    output: Annotated[Path | None, typer.Option(help="The run folder. Default: runs/imported_FILE.")] = None,
) -> None:
    """Read a checkpoint of the published code as a run.

    MaPLe, IVLP, VPT, language prompting, CoOp, CoCoOp, KgCoOp, ProGrad (as CoOp), PromptSRC (as IVLP).
    The file is read without executing anything in it.
    """
    from maple.config import resolve
    from maple.data import select_dataset
    from maple.errors import ConfigError
    from maple.importers import import_checkpoint
    from maple.runs import open_dataset, write_imported

    imported = import_checkpoint(file, init_text=init_text, method=method)
    settings: dict[str, Any] = {
        "method": {"name": imported.method, **imported.config},
        "backbone": {"name": backbone, "pretrained": pretrained},
        "data": {"dataset": dataset or "", "root": data_root, "classes": classes},
    }
    resolved = resolve([settings])
    if names is not None:
        class_names = names_in(names)
    elif dataset is not None:
        class_names = list(select_dataset(open_dataset(resolved), resolved.data.classes).class_names)
    else:
        raise ConfigError(
            "a reference checkpoint does not say its class names: give --dataset (with --data-root), or "
            "--names 'cat,dog'"
        )
    folder = output or Path("runs") / f"imported_{file.resolve().parent.name}_{file.name}"
    info = {"imported": {**imported.info, "file": file.name}, "dataset": dataset}
    learned = write_imported(resolved, imported.parameters, class_names, folder, info=info)
    typer.echo(f"{learned.title}, {learned.parameter_count():,} parameters, {len(class_names)} classes: {folder}")
