"""Explain a trained method: heat maps of images, and the words nearest to its learned text tokens."""

from maple.explain.explainer import Explainer, Explanation
from maple.explain.heat_maps import write_maps
from maple.explain.relevance import relevance
from maple.explain.words import LearnedWords, nearest_words, write_words

__all__ = ["Explainer", "Explanation", "LearnedWords", "nearest_words", "relevance", "write_maps", "write_words"]
