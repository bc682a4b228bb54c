"""The frozen backbone: load any CLIP, and run its towers stage by stage (embed, enter, blocks, finish).

A method changes their blocks by layer edits; where prompts are in a sentence, this package does not know.
"""

from maple.clip.backbone import Backbone, Preprocessing
from maple.clip.checkpoints.configurations import tower_depths
from maple.clip.edits import LayerEdit, LowRank, prompt_edits
from maple.clip.load import load_clip
from maple.clip.towers import ImageTower, TextTower

__all__ = [
    "Backbone",
    "ImageTower",
    "LayerEdit",
    "LowRank",
    "Preprocessing",
    "TextTower",
    "load_clip",
    "prompt_edits",
    "tower_depths",
]
