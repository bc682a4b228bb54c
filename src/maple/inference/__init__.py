"""Using what was trained: pictures in, class names out."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from maple.inference.answerer import Answer, Answerer, Ranked, Spoken, Unreadable
from maple.inference.opening import open_answerer
from maple.inference.pictures import STDIN, Picture, find_pictures, keep_fetched

if TYPE_CHECKING:
    from maple.inference.predictor import Predictor, prompts_file

# What runs on PyTorch is imported when it is asked for: an exported method answers without.
_ON_TORCH = {"Predictor": "maple.inference.predictor", "prompts_file": "maple.inference.predictor"}

__all__ = [
    "STDIN",
    "Answer",
    "Answerer",
    "Picture",
    "Predictor",
    "Ranked",
    "Spoken",
    "Unreadable",
    "find_pictures",
    "keep_fetched",
    "open_answerer",
    "prompts_file",
]


def __getattr__(name: str) -> Any:
    if name not in _ON_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_ON_TORCH[name]), name)
    return value
