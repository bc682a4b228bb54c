"""Data sets, images, transforms and batches. Nothing here depends on a model."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from maple.data.catalogue import (
    CATALOGUE,
    DatasetSpec,
    canonical_name,
    known_names,
    load_dataset,
    require_possible,
    short_name,
    template_of,
)
from maple.data.checks.findings import Finding
from maple.data.checks.inspection import Inspection, inspect_dataset
from maple.data.checks.open_source import check_source, open_source
from maple.data.folders.class_folders import load_domain, load_folder, walk_files
from maple.data.folders.manifests import load_manifest
from maple.data.images.eval_transform import EvalTransform, EvalView
from maple.data.images.prefetch import map_in_order, reading_threads
from maple.data.images.reading import ImageStore, has_image_name, is_image_file, read_image, to_rgb
from maple.data.published.split_files import read_split
from maple.data.records import Dataset, Item, items_hash, write_images
from maple.data.sampling import base_novel_classes, hold_out, sample_few_shot, select_classes, select_dataset
from maple.data.saved_split import SAVED_SPLIT, read_saved_split, saved_split_hash, write_saved_split

if TYPE_CHECKING:
    from maple.data.batches import (
        Batch,
        derive_seed,
        eval_batches,
        feature_batches,
        steps_per_epoch,
        train_batches,
        view_batches,
    )
    from maple.data.images.train_transform import TrainTransform

# Reading images does not need torch: without it, only these names are missing.
_ON_TORCH = {
    "Batch": "maple.data.batches",
    "derive_seed": "maple.data.batches",
    "eval_batches": "maple.data.batches",
    "feature_batches": "maple.data.batches",
    "steps_per_epoch": "maple.data.batches",
    "train_batches": "maple.data.batches",
    "view_batches": "maple.data.batches",
    "TrainTransform": "maple.data.images.train_transform",
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
    "walk_files",
    "write_images",
    "write_saved_split",
]


def __getattr__(name: str) -> Any:
    if name not in _ON_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_ON_TORCH[name]), name)
    return value
