"""Data: items and their splits, images, transforms, batches. Nothing here knows a model."""

from maple.data.catalogue import CATALOGUE, DatasetSpec, canonical_name, known_names, load_dataset, template_of
from maple.data.domains import load_domain
from maple.data.folders import load_folder, walk_files
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
from maple.data.manifests import load_manifest
from maple.data.records import Dataset, Item, items_hash
from maple.data.sampling import base_novel_classes, sample_few_shot, select_classes, select_dataset
from maple.data.splits import read_split
from maple.data.transforms import EvalTransform, TrainTransform
from maple.data.views import Views, make_views, reading_threads, views_device
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
    "Views",
    "base_novel_classes",
    "canonical_name",
    "derive_seed",
    "eval_batches",
    "feature_batches",
    "in_order",
    "is_image_file",
    "items_hash",
    "known_names",
    "load_dataset",
    "load_domain",
    "load_folder",
    "load_manifest",
    "make_views",
    "read_image",
    "read_split",
    "reading_threads",
    "sample_few_shot",
    "select_classes",
    "select_dataset",
    "steps_per_epoch",
    "template_of",
    "to_rgb",
    "train_batches",
    "view_batches",
    "views_device",
    "walk_files",
    "write_pictures",
]
