"""Protocols: which runs and evaluations a table needs, and how they are carried out. Rows are left for reports."""

from maple.sweeps.executors import Executor, in_processes, in_turn, run_sweep
from maple.sweeps.plan import (
    PROTOCOLS,
    Evaluation,
    PlannedRun,
    SweepSettings,
    plan_sweep,
    read_sweep,
    recipe_of,
    sweep_names,
)
from maple.sweeps.ray_executor import on_ray
from maple.sweeps.runner import Outcome, SweepProgress, run_group, status_of

__all__ = [
    "PROTOCOLS",
    "Evaluation",
    "Executor",
    "Outcome",
    "PlannedRun",
    "SweepProgress",
    "SweepSettings",
    "in_processes",
    "in_turn",
    "on_ray",
    "plan_sweep",
    "read_sweep",
    "recipe_of",
    "run_group",
    "run_sweep",
    "status_of",
    "sweep_names",
]
