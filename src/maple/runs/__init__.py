"""Runs: settings in, a folder out. Finished runs are never repeated, interrupted ones are resumed."""

from maple.runs.evaluation import evaluate_run
from maple.runs.folder import finished_prompts, read_history, read_rows, read_settings
from maple.runs.spec import complete, content_name, eval_transform
from maple.runs.tracking import TRACKERS, Tracked
from maple.runs.training import TrainProgress, TrainResult, train_run, train_together
from maple.runs.training_data import TrainingData

__all__ = [
    "TRACKERS",
    "Tracked",
    "TrainProgress",
    "TrainResult",
    "TrainingData",
    "complete",
    "content_name",
    "eval_transform",
    "evaluate_run",
    "finished_prompts",
    "read_history",
    "read_rows",
    "read_settings",
    "train_run",
    "train_together",
]
