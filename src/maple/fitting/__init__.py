"""Fitting: adapt CLIP to a user's images, compare with zero-shot CLIP on held-out images, and write a page."""

from maple.fitting.stored_fit import FitResult, read_fit
from maple.fitting.workflow import (
    FitProgress,
    fit,
    fit_candidates,
    fit_folder,
    fit_settings,
    inspect_source,
)
from maple.runs.selection import AUTO, CANDIDATES, Candidate, Selection
from maple.runs.selection_plan import SelectionSettings

__all__ = [
    "AUTO",
    "CANDIDATES",
    "Candidate",
    "FitProgress",
    "FitResult",
    "Selection",
    "SelectionSettings",
    "fit",
    "fit_candidates",
    "fit_folder",
    "fit_settings",
    "inspect_source",
    "read_fit",
]
