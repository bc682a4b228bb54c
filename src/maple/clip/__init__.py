"""The frozen backbone: load any CLIP, and run its towers stage by stage (embed, enter, blocks, finish).

This package does not know about prompts.
"""

from maple.clip.backbone import Backbone, Preprocessing
from maple.clip.load import load_clip, tower_depths
from maple.clip.towers import ImageTower, TextTower

__all__ = ["Backbone", "ImageTower", "Preprocessing", "TextTower", "load_clip", "tower_depths"]
