"""Using what was trained: pictures in, class names out."""

from maple.inference.pictures import STDIN, Picture, find_pictures, keep_fetched
from maple.inference.predictor import Answer, Predictor, Ranked, Unreadable, prompts_file

__all__ = [
    "STDIN",
    "Answer",
    "Picture",
    "Predictor",
    "Ranked",
    "Unreadable",
    "find_pictures",
    "keep_fetched",
    "prompts_file",
]
