"""The memory of a device."""

import os
from functools import lru_cache
from pathlib import Path

import torch

_CGROUP = Path("/sys/fs/cgroup/memory.max")


@lru_cache
def device_memory(device: torch.device) -> int:
    """The total memory of a device in bytes; of a CPU, of the machine, or the limit of this container."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory())
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 8 * 2**30
    try:
        return min(physical, int(_CGROUP.read_text()))
    except (OSError, ValueError):  # no control group, or no limit in it
        return physical
