"""Using what was trained: pictures in, class names out."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from maple.inference.images import STDIN, ImageSource, find_images, keep_fetched
from maple.inference.load_predictor import load_predictor
from maple.inference.predictor import EncodedClasses, Prediction, Predictor, Ranked, Unreadable

if TYPE_CHECKING:
    from maple.inference.torch_predictor import TorchPredictor, prompts_file

# What runs on PyTorch is imported when it is asked for: an exported method answers without.
_ON_TORCH = {"TorchPredictor": "maple.inference.torch_predictor", "prompts_file": "maple.inference.torch_predictor"}

__all__ = [
    "STDIN",
    "EncodedClasses",
    "ImageSource",
    "Prediction",
    "Predictor",
    "Ranked",
    "TorchPredictor",
    "Unreadable",
    "find_images",
    "keep_fetched",
    "load_predictor",
    "prompts_file",
]


def __getattr__(name: str) -> Any:
    if name not in _ON_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_ON_TORCH[name]), name)
    return value
