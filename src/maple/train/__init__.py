"""One training loop: any method, any number of processes, one run or several at once, resumable to the bit."""

from maple.train.best_state import BestState, describe_kept, is_validation_epoch
from maple.train.optimization import learning_rate
from maple.train.reports import EpochReport, StepReport
from maple.train.trainer import Trainer, run_epochs

__all__ = [
    "BestState",
    "EpochReport",
    "StepReport",
    "Trainer",
    "describe_kept",
    "is_validation_epoch",
    "learning_rate",
    "run_epochs",
]
