"""One process or several: who am I, and sums over all of us. Accelerate does the work when there are several."""

import atexit
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from maple.errors import ConfigError, one_of


@dataclass(frozen=True)
class Processes:
    """The group of processes that share one training run.

    Attributes:
        rank: which one this is, from 0.
        count: how many there are.
        device: where this one computes.
    """

    rank: int
    count: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files and talks to the user."""
        return self.rank == 0

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over all processes."""
        if self.count > 1:
            for tensor in tensors:
                torch.distributed.all_reduce(tensor)

    def wait(self) -> None:
        """Wait until every process has come here."""
        if self.count > 1:
            torch.distributed.barrier()


def this_process(device: str | None = None) -> Processes:
    """Join the group that `accelerate launch` (or torchrun) started; alone, just choose a device.

    Without GPUs, start the group with torchrun or `accelerate launch --multi_gpu`, and give the device cpu: `accelerate
    launch --cpu` is for MPI, and starts a single process where there is none.

    A group that is joined here is left when the interpreter ends; one that the caller joined before stays the caller's.

    Args:
        device: where to compute; without it the first GPU, or this process's own, or the CPU.

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
    return Processes(0, 1, _checked(device))


def _leave() -> None:
    """Leave a group that talks through gloo while the interpreter still lives.

    Gloo's threads may hold a collective's tensors a moment longer than its callers. One that lets go of them after
    the interpreter is gone cannot take its lock, and the process ends with SIGABRT, its work done and its exit status
    a failure (pytorch/pytorch#179291). NCCL ends its communicators by itself, and leaving such a group after an error
    would wait for the others.
    """
    distributed = torch.distributed
    if distributed.is_initialized() and distributed.get_backend() == distributed.Backend.GLOO:
        distributed.destroy_process_group()


def _checked(device: str) -> torch.device:
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        available = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        available += ["mps"] if torch.backends.mps.is_available() else []
        raise ConfigError(one_of("or absent device", device, available)) from error
    return chosen
