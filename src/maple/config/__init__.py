"""Validated settings of a run, from a preset, a file and the command line."""

from maple.config.layers import merge_layers, options_layer, override_layer, parse_value, resolve, setting_layer
from maple.config.settings import (
    BUNDLED_PREFIXES,
    SECTIONS,
    BackboneSettings,
    DataSettings,
    Positive,
    RunSettings,
    Settings,
    TrainSettings,
)
from maple.config.toml import (
    add_presets,
    preset_names,
    preset_of,
    read_named_toml,
    read_preset,
    read_toml_or_json,
    to_toml,
    toml_names,
)

__all__ = [
    "BUNDLED_PREFIXES",
    "SECTIONS",
    "BackboneSettings",
    "DataSettings",
    "Positive",
    "RunSettings",
    "Settings",
    "TrainSettings",
    "add_presets",
    "merge_layers",
    "options_layer",
    "override_layer",
    "parse_value",
    "preset_names",
    "preset_of",
    "read_named_toml",
    "read_preset",
    "read_toml_or_json",
    "resolve",
    "setting_layer",
    "to_toml",
    "toml_names",
]
