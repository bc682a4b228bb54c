"""A method as a TorchScript module: images in, logits of the trained names out, by torch alone."""

import io
import json
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from maple import __version__
from maple.errors import ExportError, first_line
from maple.export.check import largest_difference, require_equal
from maple.export.graphs import ImageSide, head_of
from maple.export.source import Source
from maple.inference.predictor import Floats

MODULE = "model.pt"
DESCRIPTION = "model.json"


class _Classifier(nn.Module):
    """Images [B, 3, R, R] to logits [B, C] of the trained names."""

    def __init__(self, source: Source) -> None:
        super().__init__()
        method = source.method
        self.side = ImageSide(method, head_of(method), frozen=False)
        self.scale = method.backbone.logit_scale
        self.class_embeddings: Tensor
        self.register_buffer("class_embeddings", method.class_embeddings())

    def encode_images(self, images: Tensor) -> Tensor:
        """Unit image features [B, D]."""
        found: tuple[Tensor, ...] = self.side(images)
        return found[0]

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, C]."""
        found: tuple[Tensor, ...] = self.side(images)
        if self.side.head == "logits":
            logits: Tensor = found[1]
            return logits
        return self.scale * found[0] @ self.class_embeddings.T


def write_torchscript(source: Source, folder: Path) -> float:
    """Write `model.pt` and `model.json` into an empty folder; return the largest difference of logits.

    Raises:
        ExportError: the method cannot be traced, or the result differs.
    """
    method = source.method
    if method.classes_depend_on_image:
        raise ExportError(
            f"{method.title}: its classes depend on the image, so no module of images alone can hold it; use --format "
            "onnx"
        )
    module = _Classifier(source).eval()
    views = torch.from_numpy(source.random[:2])
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch announces the end of torch.jit, and doubts shapes that are checked
            traced = torch.jit.trace_module(module, {"forward": views, "encode_images": views}, check_trace=False)
            frozen = torch.jit.freeze(traced, preserved_attrs=["encode_images", "class_embeddings"])
            # Not straight to the file: where the disk is full, torch ends the process.
            content = io.BytesIO()
            torch.jit.save(frozen, content)
            (folder / MODULE).write_bytes(content.getbuffer())
            loaded = torch.jit.load(str(folder / MODULE), map_location="cpu")
    except (RuntimeError, TypeError, ValueError) as error:
        raise ExportError(f"torch.jit cannot trace this backbone: {first_line(error)}") from error
    names = method.class_names
    difference = largest_difference(source, partial(_logits, loaded), method, names)
    require_equal(difference, "the TorchScript module")
    seen = method.backbone.preprocessing
    description = {
        "maple": __version__,
        "torch": torch.__version__,
        "about": {**source.about, "precision": "fp32"},
        "class_names": list(names),
        "preprocess": {"size": seen.size, "mean": seen.mean, "std": seen.std, "interpolation": seen.interpolation},
        "logit_scale": method.backbone.logit_scale,
        "maximal_difference": difference,
    }
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
    return difference


@torch.no_grad()
def _logits(module: nn.Module, views: Floats) -> Floats:
    found: Floats = np.asarray(module(torch.from_numpy(views)).numpy())
    return found
