"""Devices and their memory, and the process group of a training run, through accelerate."""

import atexit
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maple.errors import ConfigError

_CGROUP = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True)
class Processes:
    """The processes that share one training run: their count, and the rank (from 0) and device of this one."""

    rank: int
    count: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files and the output."""
        return self.rank == 0

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over all processes."""
        if self.count > 1:
            for tensor in tensors:
                torch.distributed.all_reduce(tensor)

    def wait(self) -> None:
        """Wait until every process has reached this call."""
        if self.count > 1:
            torch.distributed.barrier()


def this_process(device: str | None = None) -> Processes:
    """Join the process group that `accelerate launch` (or torchrun) started; for a single process, choose a device.

    Without GPUs, start the group with torchrun or `accelerate launch --multi_gpu`, and give the device cpu: `accelerate
    launch --cpu` is for MPI, and starts a single process where there is none.

    A group that is joined here is left when the interpreter exits; one that the caller has joined is not. The default
    device is the first GPU, or the GPU of this process, or the CPU.

    Raises:
        ConfigError: there is no such device.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState

        if not torch.distributed.is_initialized():
            atexit.register(_leave)
        state: Any = PartialState(cpu=device == "cpu" or not torch.cuda.is_available())
        return Processes(state.process_index, state.num_processes, state.device)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        available = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        available += ["mps"] if torch.backends.mps.is_available() else []
        raise ConfigError(f"there is no device {device!r}; choose one of: {', '.join(available)}") from error
    return Processes(0, 1, chosen)


def _leave() -> None:
    """Leave a gloo group before the interpreter exits.

    Gloo's threads may hold a collective's tensors for a moment longer than its callers. A thread that releases them
    after the interpreter has exited cannot take its lock, and the process ends with SIGABRT although its work is done
    (pytorch/pytorch#179291). NCCL ends its communicators by itself, and leaving such a group after an error would wait
    for the others.
    """
    distributed = torch.distributed
    if distributed.is_initialized() and distributed.get_backend() == distributed.Backend.GLOO:
        distributed.destroy_process_group()


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
