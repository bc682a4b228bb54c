"""Data: items and their splits, images, transforms, batches. Nothing here knows a model."""

from maple.data.catalogue import CATALOGUE, DatasetSpec, known_names, load_dataset, read_split, template_of
from maple.data.folders import has_own_split, load_folder, walk_files
from maple.data.images import ImageStore, is_image_file, read_image, to_rgb
from maple.data.loaders import (
    Batch,
    derive_seed,
    eval_batches,
    feature_batches,
    in_order,
    steps_per_epoch,
    train_batches,
    view_batches,
)
from maple.data.records import Dataset, Item, items_hash
from maple.data.sampling import base_novel_classes, sample_few_shot, select_classes, select_dataset
from maple.data.transforms import EvalTransform, TrainTransform
from maple.data.writing import write_pictures

__all__ = [
    "CATALOGUE",
    "Batch",
    "Dataset",
    "DatasetSpec",
    "EvalTransform",
    "ImageStore",
    "Item",
    "TrainTransform",
    "base_novel_classes",
    "derive_seed",
    "eval_batches",
    "feature_batches",
    "has_own_split",
    "in_order",
    "is_image_file",
    "items_hash",
    "known_names",
    "load_dataset",
    "load_folder",
    "read_image",
    "read_split",
    "sample_few_shot",
    "select_classes",
    "select_dataset",
    "steps_per_epoch",
    "template_of",
    "to_rgb",
    "train_batches",
    "view_batches",
    "walk_files",
    "write_pictures",
]
