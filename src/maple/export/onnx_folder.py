"""A method as a folder of ONNX graphs, tables and a manifest, which needs onnxruntime alone."""

import importlib
import json
import logging
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
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
from maple.export.export_source import ExportSource
from maple.export.graphs import ImageSide, TextSide, head_of, innermost, shifted_embeddings
from maple.export.parity_check import NEW_NAMES, largest_difference, require_parity, scores
from maple.inference import manifest as export_files
from maple.inference.manifest import Manifest, Preprocess, Slots, Templates
from maple.inference.onnx_predictor import OnnxPredictor
from maple.inference.predictor import EncodedClasses, Floats
from maple.methods import Method
from maple.methods.trained_names import TrainedNamesMethod
from maple.prompts import EnsembleClasses, PromptedClasses, TemplateClasses

INLINE_BYTES = 1_500_000_000
"""Larger weights are stored in a file of their own: a message of ONNX holds at most 2 GB."""

_ANY_SIZE = 2**40
_REQUIRED = ("onnx", "onnxscript", "onnxruntime")


def write_onnx(source: ExportSource, folder: Path, *, zero_shot: bool, int8: bool) -> Manifest:
    """Write a method, with the frozen CLIP or 8-bit weights if requested, into an empty folder; compare with PyTorch.

    Raises:
        ConfigError: the packages of `maple-clip[export]` are not installed.
        ExportError: the method cannot be exported, or the result differs.
    """
    missing = []
    for package in _REQUIRED:
        try:
            importlib.import_module(package)
        except ImportError:
            missing.append(package)
    if missing:
        raise ConfigError(f"export to ONNX needs {', '.join(missing)}: pip install 'maple-clip[export]'")
    method = source.method
    head = head_of(method)
    sentences, refusal = _sentences(method)
    image = ImageSide(method, head, frozen=zero_shot).eval()
    batch = torch.export.Dim("batch")
    inputs = {"images": torch.from_numpy(source.random_images[:2])}
    _write_graph(image, folder / export_files.IMAGE, inputs, image.outputs, ({0: batch},))
    if sentences is not None:
        tower = method.backbone.text
        ids = method.backbone.tokenize(["a", "a photo of two"])
        variable = {0: torch.export.Dim("classes")}
        if not tower.reads_padding:  # otherwise sentences have one length, which the graph says
            ids = ids[:, :8]
            variable[1] = torch.export.Dim("length", max=tower.context_length)
        inputs = {"ids": ids, "slots": torch.zeros_like(ids)}
        shapes: list[Any] = [variable, variable]
        if head == "shifted":
            inputs["shift"] = torch.zeros(tower.width)
            shapes.append(None)
        _write_graph(TextSide(method).eval(), folder / export_files.TEXT, inputs, ["features"], tuple(shapes))
        if zero_shot and not all(edit.only_prompts for edit in method.text_edits()):
            frozen = TextSide(source.frozen).eval()
            _write_graph(frozen, folder / export_files.FROZEN_TEXT, inputs, ["features"], tuple(shapes))
        shutil.copyfile(Path(open_clip.__file__).parent / export_files.MERGES, folder / export_files.MERGES)
    tables = {export_files.CLASSES: method} if head == "cosine" else {}
    if zero_shot:
        tables[export_files.ZERO_SHOT] = source.frozen
    for name, classifier in tables.items():
        np.save(folder / name, classifier.class_embeddings().detach().float().numpy(), allow_pickle=False)
    text_weight = None
    if head == "shifted" and (embeddings := shifted_embeddings(method)):
        text_weight, constant = embeddings
        np.save(folder / export_files.CLASSES, constant.float().numpy(), allow_pickle=False)
    if int8:
        _quantize(folder)
    manifest = Manifest(
        format=export_files.FORMAT,
        maple=__version__,
        about={**source.about, "precision": "int8" if int8 else "fp32"},
        class_names=method.class_names,
        preprocess=Preprocess(**asdict(method.backbone.preprocessing)),
        logit_scale=method.logit_scale / method.temperature,
        head=head,
        text_weight=text_weight,
        temperature=method.temperature,
        frozen_logit_scale=method.backbone.logit_scale if zero_shot else None,
        int8=int8,
        context_length=None if sentences is None else method.backbone.text.context_length,
        sentences=sentences,
        new_names=refusal,
        zero_shot=Templates(templates=(source.template,)) if zero_shot else None,
        versions={package: metadata.version(package) for package in ("torch", *_REQUIRED)},
        files={path.name: path.stat().st_size for path in sorted(folder.iterdir())},
        maximal_difference=None,
        checked={},
    )
    differences = _differences(source, folder, manifest)
    if not int8:
        for kind, difference in differences.items():
            require_parity(difference, f"the ONNX file ({kind})")
    counts = {"random_images": len(source.random_images), "images_of_the_run": len(source.run_images)}
    checked: dict[str, Any] = {**counts, "differences": differences}
    if int8:
        exported = OnnxPredictor(folder, manifest, zero_shot=False, device="cpu")
        classes = exported.encode_class_names(method.class_names)
        checked["scores"] = scores(source, lambda part: exported.logits(exported.encode_images(part), classes)[0])
    manifest = manifest.model_copy(update={"maximal_difference": max(differences.values()), "checked": checked})
    # Versions of the package that do not know these can read what does not need them.
    unneeded = {"temperature"} if manifest.temperature == 1 else set()
    if text_weight is None:
        unneeded.add("text_weight")
    if not zero_shot or method.logit_scale == method.backbone.logit_scale:
        unneeded.add("frozen_logit_scale")
    content = manifest.model_dump(mode="json", exclude=unneeded)
    text = json.dumps(content, indent=1, allow_nan=False, ensure_ascii=True)
    (folder / export_files.MANIFEST).write_text(text + "\n", encoding="utf-8")
    return manifest


def _differences(source: ExportSource, folder: Path, manifest: Manifest) -> dict[str, float]:
    """Largest differences of logits from PyTorch's: of the method and the frozen CLIP, for trained and new names."""
    exported = OnnxPredictor(folder, manifest, zero_shot=manifest.zero_shot is not None, device="cpu")
    names = {"trained names": source.method.class_names}
    if manifest.sentences is not None:
        names["new names"] = NEW_NAMES
    differences = {}
    for kind, class_names in names.items():
        classes = exported.encode_class_names(class_names)

        def logits(images: Floats, index: int, classes: EncodedClasses = classes) -> Floats:
            values = exported.logits(exported.encode_images(images), classes)[index]
            if values is None:
                raise ExportError("the export has lost the frozen CLIP")
            return values

        differences[kind] = largest_difference(source, partial(logits, index=0), source.method, class_names)
        if manifest.zero_shot is not None:
            frozen = partial(logits, index=1)
            differences[f"zero-shot, {kind}"] = largest_difference(source, frozen, source.frozen, class_names)
    return differences


def _sentences(method: Method) -> tuple[Slots | Templates | None, str | None]:
    """How new names are written, or why they cannot be."""
    backbone = method.backbone
    if not method.supports_new_classes:
        return None, f"{method.title} has learned weights for each class, and none for others"
    encode = type(innermost(method)).encode_classes
    if encode not in (Method.encode_classes, TrainedNamesMethod.encode_classes) and not method.classes_depend_on_image:
        return None, f"{method.title} computes the features of classes in a way of its own; use PyTorch for new names"
    if backbone.text.obstacle is not None or not backbone.uses_clip_tokenizer:
        reason = backbone.text.obstacle or "its tokenizer is not CLIP's"
        return None, f"the export has no text tower, as {reason}; use PyTorch for new names"
    classes = innermost(method).classes
    if isinstance(classes, EnsembleClasses):
        if classes.templates:
            return Templates(templates=classes.templates), None
        return None, "the export has the sentences of trained names alone; use PyTorch for new names"
    if isinstance(classes, PromptedClasses) and classes.template:
        if classes.prompt_length == 0:
            return Templates(templates=(classes.template,)), None
        return None, f"{method.title} computes tokens of each new name from the frozen CLIP; use PyTorch for new names"
    if isinstance(classes, PromptedClasses):
        words = classes.init_text.replace("_", " ").strip()
        return Slots(length=classes.prompt_length, words=words, position=classes.position), None
    if isinstance(classes, TemplateClasses) and classes.normalize_each:
        return Templates(templates=classes.templates), None
    return None, "the export cannot hold how this method writes its classes; use PyTorch for new names"


def _write_graph(module: nn.Module, path: Path, inputs: dict[str, Tensor], outputs: list[str], shapes: Any) -> None:
    """Trace a module on example inputs and write it as an ONNX graph; `shapes` has their variable dimensions."""
    from onnxscript import optimizer

    try:
        with _without_remarks(), torch.no_grad():
            names: Any = {"input_names": list(inputs), "output_names": outputs}
            program = torch.onnx.export(
                module, tuple(inputs.values()), **names, dynamic_shapes=shapes, dynamo=True, verbose=False
            )
            if program is None:
                raise ExportError(f"torch.onnx wrote no {path.name}")
            model: Any = program.model
            # Compute what depends on weights alone, of any size: parts of packed weights could not be quantised.
            optimizer.optimize(model, input_size_limit=_ANY_SIZE, output_size_limit=_ANY_SIZE)
            # The exporter notes source lines and paths of this machine at every node: remove them.
            for holder in (model, *_metadata_holders(model)):
                holder.metadata_props.clear()
            tensors = [value.const_value for value in model.graph.initializers.values()]
            weights = sum(int(tensor.nbytes) for tensor in tensors if tensor is not None)
            program.save(str(path), external_data=weights > INLINE_BYTES)
    except torch.onnx.errors.OnnxExporterError as error:
        raise ExportError(f"torch.onnx cannot write {path.name} of this backbone: {first_line(error)}") from error


def _metadata_holders(model: Any) -> Iterator[Any]:
    for graph in (model.graph, *model.functions.values()):
        yield graph
        for node in graph.all_nodes():
            yield node
            yield from node.outputs


def _quantize(folder: Path) -> None:
    """Replace the graphs by ones with 8-bit weights."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    plain = folder / "plain"
    plain.mkdir()
    for name in (export_files.IMAGE, export_files.TEXT, export_files.FROZEN_TEXT):
        parts = [path for path in (folder / name, folder / f"{name}.data") if path.is_file()]
        for path in parts:
            path.rename(plain / path.name)
        if parts:
            with _without_remarks():
                quantize_dynamic(
                    plain / name,
                    folder / name,
                    op_types_to_quantize=["MatMul"],
                    weight_type=QuantType.QInt8,
                    per_channel=True,
                    use_external_data_format=len(parts) > 1,
                )
    shutil.rmtree(plain)


@contextmanager
def _without_remarks() -> Iterator[None]:
    """Silence the exporters' logs and warnings about their own progress."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)
