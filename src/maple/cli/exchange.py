"""`maple import` and `maple export`: checkpoints of the published code in, files for other programs out."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from maple.cli import options
from maple.errors import ConfigError, shortened_list
from maple.names import names_in

if TYPE_CHECKING:
    from maple.importers import ImportedPrompts


def import_command(
    file: Annotated[Path, Argument(metavar="FILE", help="A model.pth.tar-N of the published code.")],
    dataset: Annotated[str | None, Option(help="The data set it was trained on, for the class names.")] = None,
    data_root: options.DataRoot = None,
    classes: Annotated[str, Option(help="The part of the classes it was trained on: all, base, novel.")] = "base",
    names: Annotated[str | None, Option(help='Instead of --dataset: the class names, "cat,dog".')] = None,
    shots: Annotated[
        str | None, Option(help="Its training images per class, or `all`. Default: by a folder as shots_16, else 16.")
    ] = None,
    seed: Annotated[int | None, Option(help="The seed of its training. Default: by a folder as seed1, else 1.")] = None,
    method: Annotated[str | None, Option(help="The method. Default: recognised by the keys.")] = None,
    init_text: Annotated[str, Option(help="The initial words of its prompts.")] = "a photo of a",
    backbone: Annotated[str, Option(help="The CLIP it was trained on.")] = "ViT-B-16",
    pretrained: options.Pretrained = None,
    output: Annotated[
        Path | None,
        Option(help="The run folder. Default: imported_FILE and a name derived from the settings, in runs/."),
    ] = None,
    overrides: options.Overrides = None,
) -> None:
    """Import a checkpoint of the published code as a run.

    MaPLe, IVLP, VPT, language prompting, CoOp, CoCoOp, KgCoOp, ProGrad (as CoOp), PromptSRC (as IVLP), TCP, DePT,
    MMA, MMA++ (as MMA), MMRL, MMRL++, CLIP-LoRA, CLAP. Where it says "as", the keys are the same: --method
    names the other one. The file is read without executing anything in it.

    What a file does not say, such as the sentence of a data set, is that of the method's preset for --dataset;
    --set changes it. The seed, the shots and the place of the class name in CoOp's prompt are taken from the path of
    the file, where its folders are those that the published code writes: shots_16/TRAINER/CONFIG/seed1, or
    CONFIG_16shots/nctx16_cscFalse_ctpend/seed1.

    A file that holds parts of its CLIP, or sentences of its classes, is compared with the backbone and the names; a
    note says what differs.
    """
    from maple.config import resolve
    from maple.config.settings import BUNDLED_DATASET
    from maple.data import select_dataset
    from maple.importers import SAME_KEYS, import_checkpoint
    from maple.runs.spec import content_name, open_dataset
    from maple.runs.training import write_imported

    imported = import_checkpoint(file, init_text=init_text, method=method)
    shots = shots or _in_folder(file, r"shots_(\d+)|(?:.*_)?(\d+)shots") or "16"
    if seed is None:
        seed = int(_in_folder(file, r"seed_?(\d+)") or 1)
    position = {}
    if "class_token_position" in imported.config and (place := _in_folder(file, r".*_ctp(end|middle|front)")):
        position = {"class_token_position": place}
    layer: dict[str, Any] = {
        "method": {"name": imported.method, **imported.config, **position},
        "backbone": {"name": backbone, "pretrained": pretrained},
        "data": {"dataset": dataset or "", "root": data_root, "classes": classes, "shots": options.parse_shots(shots)},
        "seed": seed,
    }
    settings = resolve([_recipe(imported, dataset, classes), layer], overrides or ())
    if dataset is None and settings.data.dataset == BUNDLED_DATASET:  # the default, which is not what it was trained on
        settings = settings.changed(data=settings.data.changed(dataset=""))
    if names is not None:
        class_names = names_in(names)
    elif dataset is not None:
        class_names = list(select_dataset(open_dataset(settings), settings.data.classes).class_names)
    else:
        raise ConfigError(
            "a checkpoint of the published code does not contain its class names: give --dataset (with --data-root), "
            "or --names 'cat,dog'"
        )
    folder = output or Path("runs") / f"imported_{file.name}_{content_name(settings)}"
    info = {"imported": {**imported.info, "file": file.name}, "dataset": dataset}
    learned = write_imported(settings, imported.parameters, class_names, folder, info=info)
    if differing := imported.frozen.not_of(learned.backbone):
        options.echo_note(
            f"the file was trained on another CLIP than {learned.backbone.name}, which has other values of "
            f"{shortened_list(differing)}; predictions are right only on its own (--backbone RN50, ViT-B-32, ...)"
        )
    if (count := imported.info.get("class_count")) not in (None, len(class_names)):
        given = "--names has" if names is not None else f"--classes {classes} of {dataset} are"
        options.echo_note(
            f"the file was trained on {count} classes, and {given} {len(class_names)}, which the run now takes for "
            "those that it was trained on; give them all, in the order of the training"
        )
    elif unlike := imported.frozen.unlike(learned.backbone, class_names):
        options.echo_note(
            f"the file was trained on other class names than {shortened_list(unlike, 3)}, or in another order"
        )
    is_given = position or any(override.startswith("method.class_token_position=") for override in overrides or ())
    if not is_given and settings.method.get("class_token_position") == "end":
        options.echo_note(
            "class names are taken to follow the prompt; otherwise, --set method.class_token_position=middle or front"
        )
    if method is None and (others := SAME_KEYS.get(imported.method)):
        options.echo(f"note: a file of {others} has the same keys; if it is one, import it with --method {others}")
    shots = "all" if settings.data.shots is None else str(settings.data.shots)
    options.echo(
        f"{learned.title}, {learned.parameter_count():,} parameters, {len(class_names)} classes, {shots} shots, "
        f"seed {settings.seed}: {folder}"
    )


def _in_folder(file: Path, pattern: str) -> str | None:
    """The last group of the nearest folder above a file whose name fits a pattern."""
    matches = (re.fullmatch(pattern, folder.name) for folder in file.absolute().parents)
    return next((match[match.lastindex or 0] for match in matches if match), None)


def _recipe(imported: "ImportedPrompts", dataset: str | None, classes: str) -> dict[str, Any]:
    """The method's settings in its preset for such a training, which those of the file are put on."""
    from maple.config import read_preset
    from maple.methods import recipe_of

    protocols = ["base-to-novel", "few-shot"]
    if dataset == "imagenet" and classes == "all":
        protocols.insert(0, "cross-dataset")
    preset = read_preset(recipe_of(imported.method, protocols))
    if preset["method"].get("base_method") != imported.config.get("base_method"):
        return {}  # its settings are those of another base method
    rules = [{**rule, "train": {}} for rule in preset.get("rules", []) if rule.get("method")]
    return {"method": preset["method"], "rules": rules}


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
        commit, name = push_folder(
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
