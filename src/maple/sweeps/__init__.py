"""Sweeps: plan the runs and evaluations that a table needs, and execute them. Reports read the resulting rows."""

from maple.sweeps.executors import in_processes, in_turn, run_sweep
from maple.sweeps.plan import PlannedRun, SweepSettings, plan_sweep, read_sweep, sweep_names
from maple.sweeps.ray_executor import on_ray
from maple.sweeps.runner import RunOutcome, SweepProgress

__all__ = [
    "PlannedRun",
    "RunOutcome",
    "SweepProgress",
    "SweepSettings",
    "in_processes",
    "in_turn",
    "on_ray",
    "plan_sweep",
    "read_sweep",
    "run_sweep",
    "sweep_names",
]
