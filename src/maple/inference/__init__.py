"""Classify images with a trained method: on PyTorch, or an export on onnxruntime without torch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from maple.inference.image_sources import ImageSource, find_images
from maple.inference.load_predictor import load_predictor
from maple.inference.predictor import Prediction, Predictor, UnreadableImage

if TYPE_CHECKING:
    from maple.inference.torch_predictor import TorchPredictor

# Imported on first use, since an export is used without torch.
_ON_TORCH = {"TorchPredictor": "maple.inference.torch_predictor"}

__all__ = [
    "ImageSource",
    "Prediction",
    "Predictor",
    "TorchPredictor",
    "UnreadableImage",
    "find_images",
    "load_predictor",
]


def __getattr__(name: str) -> Any:
    if name not in _ON_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_ON_TORCH[name]), name)
    return value
