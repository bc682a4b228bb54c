"""Runs: settings in, a folder out. Finished runs are never repeated, interrupted ones go on."""

from maple.runs.environment import environment, processor
from maple.runs.evaluation import evaluate_run, evaluation_request
from maple.runs.folder import (
    differences,
    finished_prompts,
    only_one,
    read_history,
    read_rows,
    read_settings,
    refuse_other_run,
)
from maple.runs.importing import write_imported
from maple.runs.spec import (
    cached_backbone,
    complete,
    content_name,
    eval_transform,
    open_backbone,
    open_dataset,
    relevant,
    sample,
)
from maple.runs.together import in_common, train_together
from maple.runs.tracking import TRACKERS, Tracked, require_tracker
from maple.runs.training import Silent, TrainProgress, TrainResult, fresh_method, train_run
from maple.runs.training_data import TrainingData

__all__ = [
    "TRACKERS",
    "Silent",
    "Tracked",
    "TrainProgress",
    "TrainResult",
    "TrainingData",
    "cached_backbone",
    "complete",
    "content_name",
    "differences",
    "environment",
    "eval_transform",
    "evaluate_run",
    "evaluation_request",
    "finished_prompts",
    "fresh_method",
    "in_common",
    "only_one",
    "open_backbone",
    "open_dataset",
    "processor",
    "read_history",
    "read_rows",
    "read_settings",
    "refuse_other_run",
    "relevant",
    "require_tracker",
    "sample",
    "train_run",
    "train_together",
    "write_imported",
]
