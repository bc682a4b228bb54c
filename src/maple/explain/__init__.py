"""What a trained method looks at, and which words its learned tokens lie near."""

from maple.explain.explainer import Explainer, Explanation, Side
from maple.explain.relevance import relevance
from maple.explain.words import LayerWords, NearWord, TokenWords, nearest_words
from maple.explain.write import FOLDER, read_maps, write_maps, write_words

__all__ = [
    "FOLDER",
    "Explainer",
    "Explanation",
    "LayerWords",
    "NearWord",
    "Side",
    "TokenWords",
    "nearest_words",
    "read_maps",
    "relevance",
    "write_maps",
    "write_words",
]
