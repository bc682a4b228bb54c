"""A method as a TorchScript module, which needs torch alone: images in, logits of the trained names out."""

import io
import json
import warnings
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from maple import __version__
from maple.errors import ExportError, first_line
from maple.export.export_source import ExportSource
from maple.export.graphs import ImageSide, head_of
from maple.export.parity_check import largest_difference, require_parity
from maple.inference.predictor import Floats

MODULE = "model.pt"
DESCRIPTION = "model.json"


class _ImageClassifier(nn.Module):
    """From images [B, 3, R, R] to logits [B, C] of the trained names, divided by the temperature."""

    def __init__(self, source: ExportSource) -> None:
        super().__init__()
        method = source.method
        self.side = ImageSide(method, head_of(method), frozen=False)
        self.scale = method.logit_scale / method.temperature
        self.class_embeddings: Tensor
        self.register_buffer("class_embeddings", method.class_embeddings())

    def encode_images(self, images: Tensor) -> Tensor:
        """Unit image features [B, D]."""
        outputs: tuple[Tensor, ...] = self.side(images)
        return outputs[0]

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, C]."""
        outputs: tuple[Tensor, ...] = self.side(images)
        if self.side.head == "logits":
            return outputs[1]
        return self.scale * outputs[0] @ self.class_embeddings.T


def write_torchscript(source: ExportSource, folder: Path) -> float:
    """Write `model.pt` and `model.json` into an empty folder; return the largest difference of logits.

    Raises:
        ExportError: the method cannot be traced, or the result differs.
    """
    method = source.method
    if method.classes_depend_on_image:
        problem = "its classes depend on the image, so no module of images alone can hold it"
        raise ExportError(f"{method.title}: {problem}; use format=onnx")
    module = _ImageClassifier(source).eval()
    images = torch.from_numpy(source.random_images[:2])
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch announces the end of torch.jit, and doubts shapes that are checked
            traced = torch.jit.trace_module(module, {"forward": images, "encode_images": images}, check_trace=False)
            frozen = torch.jit.freeze(traced, preserved_attrs=["encode_images", "class_embeddings"])
            # Not straight to the file: where the disk is full, torch ends the process.
            content = io.BytesIO()
            torch.jit.save(frozen, content)
            (folder / MODULE).write_bytes(content.getbuffer())
            loaded = torch.jit.load(str(folder / MODULE), map_location="cpu")
    except (RuntimeError, TypeError, ValueError) as error:
        raise ExportError(f"torch.jit cannot trace this backbone: {first_line(error)}") from error

    @torch.no_grad()
    def logits(images: Floats) -> Floats:
        return np.asarray(loaded(torch.from_numpy(images)).numpy())

    difference = largest_difference(source, logits, method, method.class_names)
    require_parity(difference, "the TorchScript module")
    description = {
        "maple": __version__,
        "torch": torch.__version__,
        "about": {**source.about, "precision": "fp32"},
        "class_names": list(method.class_names),
        "preprocess": asdict(method.backbone.preprocessing),
        "logit_scale": method.logit_scale / method.temperature,
        "maximal_difference": difference,
    }
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
    return difference
