"""Protocols: which runs and evaluations a table needs, and how they are carried out. Rows are left for reports."""

from maple.protocols.executors import run_sweep
from maple.protocols.plan import PROTOCOLS, Evaluation, PlannedRun, SweepSettings, plan_sweep, read_sweep, sweep_names
from maple.protocols.runner import Outcome, SweepProgress, status_of

__all__ = [
    "PROTOCOLS",
    "Evaluation",
    "Outcome",
    "PlannedRun",
    "SweepProgress",
    "SweepSettings",
    "plan_sweep",
    "read_sweep",
    "run_sweep",
    "status_of",
    "sweep_names",
]
