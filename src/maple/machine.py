"""What this process may use of its machine: cores, and memory."""

import math
import os
from contextlib import suppress
from pathlib import Path

_GROUP_OF_THIS = Path("/proc/self/cgroup")
_GROUPS = Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """The number of cores that this process may use: those of its job on a cluster, or of its container, if it has any.

    Example:
        >>> usable_cores()
        8
    """
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_limit() -> float:
    """The bytes of memory that the control groups of this process allow; infinity if they have no limit.

    A limit of a group is one of all groups in it: those of SLURM and systemd are often some levels above the process.

    Example:
        >>> memory_limit() / 2**30  # within `docker run --memory 16g`
        16.0
    """
    lines = ["0::/"]
    with suppress(OSError):
        lines = _GROUP_OF_THIS.read_text(encoding="utf-8", errors="replace").splitlines()
    limits = [math.inf]
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, name = _GROUPS, "memory.max"
        elif "memory" in controllers.split(","):  # version 1 of control groups
            root, name = _GROUPS / "memory", "memory.limit_in_bytes"
        else:
            continue
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(root):
                with suppress(OSError, ValueError):  # no such group here, or no limit in it
                    limits.append(int((folder / name).read_text()))
    return min(limits)
