"""Data sets, images, transforms and batches. Nothing here depends on a model."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from maple.data.catalogue import CATALOGUE, DatasetSpec, known_names, load_dataset, template_of
from maple.data.checks.findings import Finding
from maple.data.checks.inspection import Inspection, inspect_dataset
from maple.data.checks.open_source import open_source
from maple.data.folders.class_folders import load_folder
from maple.data.folders.manifests import load_manifest
from maple.data.images.eval_transform import EvalTransform, EvalView
from maple.data.images.reading import ImageStore, read_image
from maple.data.records import Dataset, Item, write_images
from maple.data.sampling import base_novel_classes, hold_out, sample_few_shot, select_classes, select_dataset

if TYPE_CHECKING:
    from maple.data.batches import Batch, eval_batches, train_batches
    from maple.data.images.train_transform import TrainTransform

# Reading images does not need torch: without it, only these names are missing.
_WITH_TORCH = {
    "Batch": "maple.data.batches",
    "eval_batches": "maple.data.batches",
    "train_batches": "maple.data.batches",
    "TrainTransform": "maple.data.images.train_transform",
}

__all__ = [
    "CATALOGUE",
    "Batch",
    "Dataset",
    "DatasetSpec",
    "EvalTransform",
    "EvalView",
    "Finding",
    "ImageStore",
    "Inspection",
    "Item",
    "TrainTransform",
    "base_novel_classes",
    "eval_batches",
    "hold_out",
    "inspect_dataset",
    "known_names",
    "load_dataset",
    "load_folder",
    "load_manifest",
    "open_source",
    "read_image",
    "sample_few_shot",
    "select_classes",
    "select_dataset",
    "template_of",
    "train_batches",
    "write_images",
]


def __getattr__(name: str) -> Any:
    if name not in _WITH_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_WITH_TORCH[name]), name)
    return value
