"""maple-clip: adapt CLIP to your images from a handful of examples, by multi-modal prompt learning."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# The public names and where they live; importing maple alone loads neither torch nor a model.
_PUBLIC = {
    "METHODS": "maple.methods",
    "Method": "maple.methods",
    "PromptClassifier": "maple.inference.classifier",
    "build_method": "maple.methods",
    "load_clip": "maple.clip",
    "Backbone": "maple.clip",
    "evaluate": "maple.evaluation",
    "load_dataset": "maple.data",
    "load_prompts": "maple.checkpoint",
    "save_prompts": "maple.checkpoint",
    "MapleError": "maple.errors",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'maple' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
