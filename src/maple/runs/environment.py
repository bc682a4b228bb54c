"""What a result was made with: versions, machine, command."""

import platform
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from maple.checkpoint import versions


def environment() -> dict[str, Any]:
    """As JSON, for the folder of a run or beside a measurement."""
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
    """The processor's name; "cpu" where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next((name for name in named if name), platform.processor() or "cpu")
