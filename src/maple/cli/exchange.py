"""`maple import` and `maple export`: checkpoints of the published code in, files for other programs out."""

from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from maple.cli import options
from maple.errors import ConfigError
from maple.names import names_in


def import_command(
    file: Annotated[Path, Argument(metavar="FILE", help="A model.pth.tar-N of the published code.")],
    dataset: Annotated[str | None, Option(help="The data set it was trained on, for the class names.")] = None,
    data_root: options.DataRoot = None,
    classes: Annotated[str, Option(help="The part of the classes it was trained on: all, base, novel.")] = "base",
    names: Annotated[str | None, Option(help='Instead of --dataset: the class names, "cat,dog".')] = None,
    method: Annotated[str | None, Option(help="The method. Default: recognised by the keys.")] = None,
    init_text: Annotated[str, Option(help="The initial words of its prompts.")] = "a photo of a",
    backbone: Annotated[str, Option(help="The CLIP it was trained on.")] = "ViT-B-16",
    pretrained: options.Pretrained = None,
    output: Annotated[Path | None, Option(help="The run folder. Default: runs/imported_FILE.")] = None,
    overrides: options.Overrides = None,
) -> None:
    """Import a checkpoint of the published code as a run.

    MaPLe, IVLP, VPT, language prompting, CoOp, CoCoOp, KgCoOp, ProGrad (as CoOp), PromptSRC (as IVLP), TCP, DePT,
    MMA, MMA++ (as MMA), MMRL, MMRL++, CLIP-LoRA. The file is read without executing anything in it.

    What a file does not say, such as the sentence of a data set, is that of the method's preset for --dataset;
    --set changes it.
    """
    from maple.config import read_preset, resolve
    from maple.data import select_dataset
    from maple.importers import import_checkpoint
    from maple.methods import recipe_of
    from maple.runs.spec import open_dataset
    from maple.runs.training import write_imported

    imported = import_checkpoint(file, init_text=init_text, method=method)
    layer: dict[str, Any] = {
        "method": {"name": imported.method, **imported.config},
        "backbone": {"name": backbone, "pretrained": pretrained},
        "data": {"dataset": dataset or "", "root": data_root, "classes": classes},
    }
    preset = read_preset(recipe_of(imported.method, ["base-to-novel", "few-shot"]))
    rules = [{**rule, "train": {}} for rule in preset.get("rules", []) if rule.get("method")]
    settings = resolve([{"method": preset["method"], "rules": rules}, layer], overrides or ())
    if names is not None:
        class_names = names_in(names)
    elif dataset is not None:
        class_names = list(select_dataset(open_dataset(settings), settings.data.classes).class_names)
    else:
        raise ConfigError(
            "a checkpoint of the published code does not contain its class names: give --dataset (with --data-root), "
            "or --names 'cat,dog'"
        )
    folder = output or Path("runs") / f"imported_{file.resolve().parent.name}_{file.name}"
    info = {"imported": {**imported.info, "file": file.name}, "dataset": dataset}
    learned = write_imported(settings, imported.parameters, class_names, folder, info=info)
    options.echo(f"{learned.title}, {learned.parameter_count():,} parameters, {len(class_names)} classes: {folder}")


def push_command(
    run: options.TrainedModel,
    repository: Annotated[str, Argument(metavar="OWNER/NAME", help="The repository; it is created if needed.")],
    private: Annotated[bool, Option("--private", help="Create a repository that only its owners can read.")] = False,
    branch: Annotated[str | None, Option(help="A branch, created if needed. Default: main.")] = None,
    message: Annotated[str, Option(help="Of the commit.")] = "Upload prompts",
) -> None:
    """Upload prompts to the Hugging Face hub, with a card that says what they are and what was measured.

    `maple predict hub:OWNER/NAME` then loads them anywhere. The token is that of `hf auth login`, or HF_TOKEN. CLIP is
    not uploaded, and neither are images, nor the folder that they were in.
    """
    from tempfile import TemporaryDirectory

    from maple.inference.hub import push_folder
    from maple.inference.sharing import share_run
    from maple.inference.torch_predictor import prompts_file
    from maple.names import repository_of

    name = repository_of(repository) or repository
    with TemporaryDirectory() as place:
        folder = share_run(prompts_file(run), Path(place) / "prompts")
        commit = push_folder(
            folder, name, message=message, branch=branch, token=None, private=True if private else None
        )
    options.echo(f"pushed: {commit}")
    options.echo(f"next: maple predict hub:{name} image.jpg")


def gallery_command(
    index: Annotated[Path, Argument(metavar="INDEX", help="A TOML or JSON file: title, and [[prompts]] with source.")],
    output: Annotated[Path, Option(help="The page to write.")] = Path("gallery.html"),
) -> None:
    """Write a page that lists prompts by backbone and data set; an index names them.

    A source is hub:OWNER/NAME, a run folder or a prompts file; a note may be with it. No backbone is loaded.

    Exit status: 0 all were read, 1 some were not, 2 none was, or wrong use.
    """
    from maple import files
    from maple.gallery import gallery_page, read_gallery

    gallery = read_gallery(index)
    files.write_text(output, gallery_page(gallery))
    for entry in gallery.unreadable:
        options.echo(f"maple: {entry.source} is left out: {entry.reason}", err=True)
    options.echo(f"written: {output}")
    raise typer.Exit(1 if gallery.unreadable else 0)


def export_command(
    run: options.TrainedModel,
    output: Annotated[Path, Option(help="The folder to write.")],
    format: Annotated[
        str, Option(help="onnx (for `maple predict`), torchscript, openclip, transformers, openai.")
    ] = "onnx",
    zero_shot: Annotated[bool, Option("--zero-shot", help="onnx: include zero-shot CLIP.")] = False,
    int8: Annotated[bool, Option("--int8", help="onnx: 8-bit weights; smaller, but not exact.")] = False,
    data_root: options.DataRoot = None,
    backbone: options.TrainedBackbone = None,
    pretrained: options.Pretrained = None,
    trust_backbone: options.TrustBackbone = False,
    trust_code: options.TrustCode = False,
) -> None:
    """Export a trained method for other programs, and check that it computes the same."""
    from maple.export import export_run

    clip = options.load_arguments(backbone, pretrained, trust_backbone, trust_code)
    written = export_run(run, output, format, zero_shot=zero_shot, int8=int8, data_root=data_root, **clip)
    images = "random images" if not written.images else f"random images and {written.images} of the run's"
    options.echo(f"{written.folder}: {written.bytes / 1e6:,.1f} MB")
    options.echo(f"largest difference of logits from PyTorch: {written.difference:.2g} ({images})")
    if (scores := written.scores) is not None:
        options.echo(
            f"accuracy on {scores['images']:,} held-out images: {scores['accuracy']:.1%} in 8 bits, "
            f"{scores['accuracy_float32']:.1%} in float32; the same class on {scores['same_class']:.1%}"
        )
    for note in written.notes:
        options.echo(note)
    if written.new_names is not None:
        options.echo_note(f"the export supports only the trained class names: {written.new_names}")
