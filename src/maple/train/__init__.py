"""One training loop: any method, any number of processes, one run or several at once, resumable to the bit."""

from maple.train.trainer import EpochReport, StepReport, Trainer, learning_rate, run_epochs

__all__ = ["EpochReport", "StepReport", "Trainer", "learning_rate", "run_epochs"]
