"""`fit`: somebody's own images in; a trained run, its comparison with zero-shot CLIP, and a page out."""

from maple.fitting.result import FitResult, read_fit
from maple.fitting.run import FitProgress, SilentFit, fit, fit_folder, fit_settings, inspect_source

__all__ = ["FitProgress", "FitResult", "SilentFit", "fit", "fit_folder", "fit_settings", "inspect_source", "read_fit"]
