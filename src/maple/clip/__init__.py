"""The frozen backbone: any CLIP, opened at its seams (embed, enter, blocks, finish). Knows nothing of prompts."""

from maple.clip.backbone import Backbone, Preprocessing
from maple.clip.blocks import Bucket, Memory
from maple.clip.load import PRECISIONS, load_clip
from maple.clip.sizes import tower_depths
from maple.clip.towers import ImageTower, TextTower
from maple.clip.tracing import is_recorded

__all__ = [
    "PRECISIONS",
    "Backbone",
    "Bucket",
    "ImageTower",
    "Memory",
    "Preprocessing",
    "TextTower",
    "is_recorded",
    "load_clip",
    "tower_depths",
]
