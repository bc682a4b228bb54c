"""A method as a folder of ONNX graphs, tables and a manifest, which onnxruntime alone can answer from."""

import importlib
import json
import logging
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from torch import Tensor, nn

from maple import __version__
from maple.errors import ConfigError, ExportError, first_line
from maple.export.check import NEW_NAMES, largest_difference, require_equal
from maple.export.graphs import ImageSide, TextSide, head_of, innermost
from maple.export.source import Source
from maple.inference import manifest as on_disk
from maple.inference.manifest import Manifest, Preprocess, Slots, Templates
from maple.inference.onnx_predictor import OnnxPredictor
from maple.inference.predictor import EncodedClasses, Floats
from maple.methods import Method
from maple.prompts import PromptedClasses, TemplateClasses

INLINE_BYTES = 1_500_000_000
"""Weights beyond this lie in a file beside their graph: one message of ONNX holds 2 GB."""

_ANY_SIZE = 2**40
_NEEDED = ("onnx", "onnxscript", "onnxruntime")
_VERSIONS = ("torch", "onnx", "onnxscript", "onnxruntime")


def write_onnx(source: Source, folder: Path, *, zero_shot: bool, int8: bool) -> Manifest:
    """Write a method into an empty folder and check it against PyTorch.

    Args:
        zero_shot: include the frozen CLIP.
        int8: with 8-bit weights of the matrix products.

    Raises:
        ConfigError: the packages of `maple-clip[export]` are not installed.
        ExportError: the method cannot be exported, or the result differs.
    """
    _require_packages()
    method = source.method
    head = head_of(method)
    sentences, refusal = _sentences(method)
    with_text = sentences is not None
    image = ImageSide(method, head, frozen=zero_shot).eval()
    batch = torch.export.Dim("batch")
    _write(
        image, (torch.from_numpy(source.random[:2]),), folder / on_disk.IMAGE, ["images"], image.outputs, ({0: batch},)
    )
    if with_text:
        _write_text(method, folder / on_disk.TEXT, shifted=head == "shifted")
        shutil.copyfile(Path(open_clip.__file__).parent / on_disk.MERGES, folder / on_disk.MERGES)
    if head == "cosine":
        _save_table(folder / on_disk.CLASSES, method.class_embeddings())
    if zero_shot:
        _save_table(folder / on_disk.ZERO_SHOT, source.frozen.class_embeddings())
    if int8:
        _quantise(folder)
    manifest = Manifest(
        format=on_disk.FORMAT,
        maple=__version__,
        about={**source.about, "precision": "int8" if int8 else "fp32"},
        class_names=method.class_names,
        preprocess=_preprocess(method),
        logit_scale=method.backbone.logit_scale,
        head=head,
        int8=int8,
        context_length=method.backbone.text.context_length if with_text else None,
        sentences=sentences,
        new_names=refusal,
        zero_shot=Templates(templates=(source.template,)) if zero_shot else None,
        versions={package: metadata.version(package) for package in _VERSIONS},
        files={},
        maximal_difference=None,
        checked={},
    )
    return _checked(source, folder, manifest)


def _checked(source: Source, folder: Path, manifest: Manifest) -> Manifest:
    """The manifest with what a comparison with PyTorch has shown, written."""
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    manifest = manifest.model_copy(update={"files": sizes})
    exported = OnnxPredictor(folder, manifest, zero_shot=manifest.zero_shot is not None, device="cpu")
    lists: list[Sequence[str]] = [source.method.class_names]
    if manifest.sentences is not None:
        lists.append(NEW_NAMES)
    differences = {}
    for names, kind in zip(lists, ("trained names", "new names"), strict=False):
        spoken = exported._spoken(tuple(names))

        def logits(views: Floats, which: int, spoken: EncodedClasses = spoken) -> Floats:
            found = exported.logits(exported.encode(views), spoken)[which]
            if found is None:
                raise ExportError("the export has lost the frozen CLIP")
            return found

        differences[kind] = largest_difference(source, partial(logits, which=0), source.method, names)
        if manifest.zero_shot is not None:
            beside = largest_difference(source, partial(logits, which=1), source.frozen, names)
            differences[f"zero-shot, {kind}"] = beside
    if not manifest.int8:
        for kind, difference in differences.items():
            require_equal(difference, f"the ONNX file ({kind})")
    checked = {"random_images": len(source.random), "images_of_the_run": len(source.own), "differences": differences}
    manifest = manifest.model_copy(update={"maximal_difference": max(differences.values()), "checked": checked})
    text = json.dumps(manifest.model_dump(mode="json"), indent=1, allow_nan=False, ensure_ascii=True)
    (folder / on_disk.MANIFEST).write_text(text + "\n", encoding="utf-8")
    return manifest


def _sentences(method: Method) -> tuple[Slots | Templates | None, str | None]:
    """How new names are written, or why they cannot be."""
    if not method.supports_new_classes:
        return None, f"{method.title} has learned something for each class and can say nothing of others"
    if (refusal := _text_refusal(method)) is not None:
        return None, refusal
    classes = innermost(method).classes
    if isinstance(classes, PromptedClasses):
        words = classes.init_text.replace("_", " ").strip()
        return Slots(length=classes.prompt_length, words=words, position=classes.position), None
    if isinstance(classes, TemplateClasses) and classes.unit_each:
        return Templates(templates=classes.templates), None
    return None, "the export could not hold how this method writes its classes; run it with PyTorch for that"


def _text_refusal(method: Method) -> str | None:
    """Why the text tower cannot be exported."""
    backbone = method.backbone
    if backbone.text.obstacle is not None:
        return f"the export holds no text tower, as {backbone.text.obstacle}; run it with PyTorch for new names"
    if not backbone.uses_clip_tokenizer:
        return "the export holds no text tower, as its tokenizer is not CLIP's; run it with PyTorch for new names"
    return None


def _preprocess(method: Method) -> Preprocess:
    seen = method.backbone.preprocessing
    return Preprocess(size=seen.size, mean=seen.mean, std=seen.std, interpolation=seen.interpolation)


def _write_text(method: Method, path: Path, *, shifted: bool) -> None:
    ids = method.backbone.tokenize(["a", "a photo of two"])[:, :8]
    inputs = [ids, torch.zeros_like(ids)]
    classes, length = torch.export.Dim("classes"), torch.export.Dim("length", max=method.backbone.text.context_length)
    shapes: list[Any] = [{0: classes, 1: length}, {0: classes, 1: length}]
    names = ["ids", "slots"]
    if shifted:
        inputs.append(torch.zeros(method.backbone.text.width))
        shapes.append(None)
        names.append("shift")
    _write(TextSide(method).eval(), tuple(inputs), path, names, ["features"], tuple(shapes))


def _write(
    module: nn.Module, inputs: tuple[Tensor, ...], path: Path, names: list[str], outputs: list[str], shapes: Any
) -> None:
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                module,
                inputs,
                input_names=names,
                output_names=outputs,
                dynamic_shapes=shapes,
                dynamo=True,
                verbose=False,
            )
            if program is None:
                raise ExportError(f"torch.onnx wrote no {path.name}")
            _fold_weights(program.model)
            _forget_origins(program.model)
            tensors = [value.const_value for value in program.model.graph.initializers.values()]
            weights = sum(int(one.nbytes) for one in tensors if one is not None)
            program.save(str(path), external_data=weights > INLINE_BYTES)
    except torch.onnx.errors.OnnxExporterError as error:
        raise ExportError(f"torch.onnx cannot write {path.name} of this backbone: {first_line(error)}") from error


def _fold_weights(model: Any) -> None:
    """Compute what depends on weights alone, of whatever size: parts of packed weights could not be quantised."""
    from onnxscript import optimizer

    optimizer.optimize(model, input_size_limit=_ANY_SIZE, output_size_limit=_ANY_SIZE)


def _forget_origins(model: Any) -> None:
    """Drop what the exporter notes of every node: lines of source and paths of the machine it ran on."""
    model.metadata_props.clear()
    for graph in (model.graph, *model.functions.values()):
        graph.metadata_props.clear()
        for node in graph.all_nodes():
            node.metadata_props.clear()
            for value in node.outputs:
                value.metadata_props.clear()


def _quantise(folder: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    plain = folder / "plain"
    plain.mkdir()
    for name in (on_disk.IMAGE, on_disk.TEXT):
        parts = [path for path in (folder / name, folder / f"{name}.data") if path.is_file()]
        for path in parts:
            path.rename(plain / path.name)
        if parts:
            with _quiet():
                quantize_dynamic(
                    plain / name,
                    folder / name,
                    op_types_to_quantize=["MatMul"],
                    weight_type=QuantType.QInt8,
                    per_channel=True,
                    use_external_data_format=len(parts) > 1,
                )
    shutil.rmtree(plain)


def _save_table(path: Path, features: Tensor) -> None:
    np.save(path, features.detach().float().numpy(), allow_pickle=False)


def _require_packages() -> None:
    missing = []
    for package in _NEEDED:
        try:
            importlib.import_module(package)
        except ImportError:
            missing.append(package)
    if missing:
        raise ConfigError(f"export to ONNX needs {', '.join(missing)}: pip install 'maple-clip[export]'")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporters' remarks on their own progress off the user's screen."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)
