"""Prompt tokens: their initial values, the coupling of towers, where they are inserted, and the block loop."""

from maple.prompts.classes import EnsembleClasses, PromptedClasses, TemplateClasses
from maple.prompts.coupling import Coupling
from maple.prompts.encode import (
    encode_image,
    encode_image_and_tokens,
    encode_image_with_attention,
    encode_text,
    l2_normalize,
    to_float32,
)
from maple.prompts.initialise import PROMPT_STD, random_tokens, word_tokens
from maple.prompts.passes import share_passes
from maple.prompts.splice import Sentences, write_sentences

__all__ = [
    "PROMPT_STD",
    "Coupling",
    "EnsembleClasses",
    "PromptedClasses",
    "Sentences",
    "TemplateClasses",
    "encode_image",
    "encode_image_and_tokens",
    "encode_image_with_attention",
    "encode_text",
    "l2_normalize",
    "random_tokens",
    "share_passes",
    "to_float32",
    "word_tokens",
    "write_sentences",
]
