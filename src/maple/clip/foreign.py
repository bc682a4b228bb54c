"""Calls into libraries that build models and tokenizers: what they raise, log and draw stays there."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# Raised by open_clip, timm, transformers and torch for a configuration that they cannot build.
FOREIGN_ERRORS = (
    *(RuntimeError, ValueError, OSError, LookupError, TypeError, AttributeError, ArithmeticError, AssertionError),
    *(ImportError, MemoryError, RecursionError),
)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what open_clip and transformers log about random weights, activations and tokenizers."""
    # open_clip uses the root logger, to which the first record would add a handler for good if it had none.
    root, silent, library = logging.getLogger(), logging.NullHandler(), logging.getLogger("transformers")
    levels = root.level, library.level
    root.addHandler(silent)
    root.setLevel(logging.CRITICAL)
    library.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        root.setLevel(levels[0])
        library.setLevel(levels[1])
        root.removeHandler(silent)
