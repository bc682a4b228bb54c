"""Devices and their memory, and the process group of a training run, through accelerate."""

import atexit
import logging
import os
import platform
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maple.errors import ConfigError, MapleError, first_line
from maple.machine import memory_limit

logger = logging.getLogger(__name__)

_JOIN_TIMEOUT = timedelta(minutes=30)
_SILENCE = 5.0
"""Seconds of waiting for other processes until they are named."""


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

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """If the body raises a MapleError in some of the processes, raise one in the others too, after the body.

        Otherwise these would wait for the failed ones in their next sum, for ever. The body must not wait for others.
        """
        if self.count == 1:
            yield
            return
        error: MapleError | None = None
        try:
            yield
        except MapleError as caught:
            error = caught
        failures = torch.tensor(float(error is not None), device=self.device)
        self.sum_([failures])
        if error is not None:
            raise error
        if failures:
            raise MapleError("another process failed; its message says why")


def this_process(device: str | None = None) -> Processes:
    """Join the process group that `accelerate launch` (or torchrun) started; for a single process, choose a device.

    Without GPUs, start the group with torchrun or `accelerate launch --multi_gpu`, and give the device cpu: `accelerate
    launch --cpu` is for MPI, and starts a single process where there is none.

    A group that is joined here is left when the interpreter exits; one that the caller has joined is not. The default
    device is the first CUDA GPU, or the GPU of this process, or the CPU.

    Raises:
        ConfigError: there is no such device, the environment variables of a launcher are incomplete, or the other
            processes do not come.
    """
    rank, count = launched()
    if count == 1:
        return Processes(0, 1, choose_device(device))
    from accelerate import PartialState

    if not torch.distributed.is_initialized():
        atexit.register(_leave)
    # The defaults of accelerate for CPUs. On GPUs, without a local rank, every process would train alone.
    address, port = os.environ["MASTER_ADDR"], os.environ.setdefault("MASTER_PORT", "29500")
    os.environ.setdefault("LOCAL_RANK", "0")
    others = f"{count - 1} other process{'es' if count > 2 else ''} at {address}:{port}"
    why = f"WORLD_SIZE is {count} and RANK is {rank}"
    alone = "to work in one process, unset WORLD_SIZE"
    waiting = threading.Timer(_SILENCE, logger.warning, [f"waiting for {others} ({why}; {alone})"])
    waiting.daemon = True
    waiting.start()
    try:
        state: Any = PartialState(cpu=device == "cpu" or not torch.cuda.is_available(), timeout=_JOIN_TIMEOUT)
    except (RuntimeError, ValueError) as error:  # torch's DistError is a RuntimeError
        raise ConfigError(f"the {others} cannot be joined: {first_line(error)} ({why}); {alone}") from error
    finally:
        waiting.cancel()
    return Processes(state.process_index, state.num_processes, state.device)


def launched() -> tuple[int, int]:
    """The rank of this process and the number of processes that a launcher started, from its environment variables.

    Raises:
        ConfigError: WORLD_SIZE or RANK is not a number in range, or other variables of the launcher are missing.
    """
    size = os.environ.get("WORLD_SIZE", "").strip() or "1"
    fix = (
        "to work in one process, unset WORLD_SIZE; to work in several, start them with torchrun or `accelerate launch`"
    )
    try:
        count = int(size)
    except ValueError as error:
        raise ConfigError(f"WORLD_SIZE is {size!r}, which is not a number of processes; {fix}") from error
    if count <= 1:
        return 0, 1
    if missing := [name for name in ("RANK", "MASTER_ADDR") if not os.environ.get(name)]:
        raise ConfigError(f"WORLD_SIZE is {count}, but a launcher also sets {' and '.join(missing)}; {fix}")
    rank = os.environ["RANK"].strip()
    if not (rank.isdecimal() and int(rank) < count):
        raise ConfigError(f"RANK is {rank!r}; with WORLD_SIZE {count} it is a number from 0 to {count - 1}; {fix}")
    for name, most in (("MASTER_PORT", 65535), ("LOCAL_RANK", count - 1)):
        value = os.environ.get(name, "0").strip()
        if not (value.isdecimal() and int(value) <= most):
            raise ConfigError(f"{name} is {value!r}; it is a number up to {most}; {fix}")
    return int(rank), count


def choose_device(device: str | None = None) -> torch.device:
    """The device of this name, or the first CUDA GPU, or the CPU; of this process alone, whatever a launcher has set.

    Raises:
        ConfigError: there is no such device.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        available = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        available += ["mps"] if torch.backends.mps.is_available() else []
        raise ConfigError(f"there is no device {device!r}; choose one of: {', '.join(available)}") from error
    return chosen


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
    """The total memory of a device in bytes; of a CPU, of the machine, or what this process may use of it."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory())
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 8 * 2**30
    return int(min(physical, memory_limit()))


def processor() -> str:
    """The processor's name; "cpu" where the system does not give it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(filter(None, names), platform.processor() or "cpu")
