"""One training loop: any method, any number of processes, one run or several at once, resumable to the bit."""

from maple.train.epochs import Batches, EpochReport, StepReport, run_epochs
from maple.train.trainer import Trainer, learning_rate, make_optimizer

__all__ = ["Batches", "EpochReport", "StepReport", "Trainer", "learning_rate", "make_optimizer", "run_epochs"]
