"""Fitting: adapt CLIP to a user's images, compare with zero-shot CLIP on held-out images, and write a page."""

from maple.fitting.stored_fit import FitResult, read_fit
from maple.fitting.workflow import FitProgress, fit, fit_folder, fit_settings, inspect_source

__all__ = ["FitProgress", "FitResult", "fit", "fit_folder", "fit_settings", "inspect_source", "read_fit"]
