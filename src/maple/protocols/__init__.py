"""Protocols: which runs and evaluations a table needs, and how they are carried out. Rows are left for reports."""

from maple.protocols.executors import Executor, in_processes, in_turn, run_sweep
from maple.protocols.plan import (
    PROTOCOLS,
    Evaluation,
    PlannedRun,
    SweepSettings,
    plan_sweep,
    read_sweep,
    recipe_of,
    sweep_names,
)
from maple.protocols.ray_executor import on_ray
from maple.protocols.runner import Outcome, SweepProgress, carry_out, status_of

__all__ = [
    "PROTOCOLS",
    "Evaluation",
    "Executor",
    "Outcome",
    "PlannedRun",
    "SweepProgress",
    "SweepSettings",
    "carry_out",
    "in_processes",
    "in_turn",
    "on_ray",
    "plan_sweep",
    "read_sweep",
    "recipe_of",
    "run_sweep",
    "status_of",
    "sweep_names",
]
