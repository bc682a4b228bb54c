"""Data: items and their splits, images, transforms, batches. Nothing here knows a model."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from maple.data.catalogue import (
    CATALOGUE,
    DatasetSpec,
    canonical_name,
    known_names,
    load_dataset,
    require_possible,
    template_of,
)
from maple.data.domains import load_domain
from maple.data.findings import Finding
from maple.data.folders import load_folder, walk_files
from maple.data.images import ImageStore, has_image_name, is_image_file, read_image, to_rgb
from maple.data.inputs import EvalView
from maple.data.inspection import Inspection, inspect_dataset
from maple.data.listing import SAVED_SPLIT, read_saved_split, saved_split_hash, write_saved_split
from maple.data.manifests import load_manifest
from maple.data.opening import check_source, open_source, short_name
from maple.data.ordered import map_in_order
from maple.data.records import Dataset, Item, items_hash
from maple.data.sampling import base_novel_classes, hold_out, sample_few_shot, select_classes, select_dataset
from maple.data.splits import read_split
from maple.data.writing import write_images

if TYPE_CHECKING:
    from maple.data.loaders import (
        Batch,
        derive_seed,
        eval_batches,
        feature_batches,
        steps_per_epoch,
        train_batches,
        view_batches,
    )
    from maple.data.transforms import EvalTransform, TrainTransform
    from maple.data.views import Views, make_views, reading_threads, views_device

# Reading images needs no torch, and where it is not installed these names alone are missing.
_ON_TORCH = {
    "Batch": "maple.data.loaders",
    "derive_seed": "maple.data.loaders",
    "eval_batches": "maple.data.loaders",
    "feature_batches": "maple.data.loaders",
    "steps_per_epoch": "maple.data.loaders",
    "train_batches": "maple.data.loaders",
    "view_batches": "maple.data.loaders",
    "EvalTransform": "maple.data.transforms",
    "TrainTransform": "maple.data.transforms",
    "Views": "maple.data.views",
    "make_views": "maple.data.views",
    "reading_threads": "maple.data.views",
    "views_device": "maple.data.views",
}

__all__ = [
    "CATALOGUE",
    "SAVED_SPLIT",
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
    "Views",
    "base_novel_classes",
    "canonical_name",
    "check_source",
    "derive_seed",
    "eval_batches",
    "feature_batches",
    "has_image_name",
    "hold_out",
    "inspect_dataset",
    "is_image_file",
    "items_hash",
    "known_names",
    "load_dataset",
    "load_domain",
    "load_folder",
    "load_manifest",
    "make_views",
    "map_in_order",
    "open_source",
    "read_image",
    "read_saved_split",
    "read_split",
    "reading_threads",
    "require_possible",
    "sample_few_shot",
    "saved_split_hash",
    "select_classes",
    "select_dataset",
    "short_name",
    "steps_per_epoch",
    "template_of",
    "to_rgb",
    "train_batches",
    "view_batches",
    "views_device",
    "walk_files",
    "write_images",
    "write_saved_split",
]


def __getattr__(name: str) -> Any:
    if name not in _ON_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_ON_TORCH[name]), name)
    return value
