"""The environment of a result: versions, machine, command."""

import platform
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from maple.checkpoint import versions


def environment() -> dict[str, Any]:
    """The environment of this process as JSON, for a run folder or a measurement.

    Example:
        >>> environment()["versions"]["maple"]
        '0.1.0'
    """
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "python": platform.python_version(),
        "machine": platform.platform(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else processor(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


def processor() -> str:
    """The processor's name; "cpu" where the system does not give it.

    Example:
        >>> processor()
        'AMD EPYC 7B13'
    """
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(filter(None, names), platform.processor() or "cpu")
