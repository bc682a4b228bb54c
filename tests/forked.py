"""Functions and `maple` commands in processes of their own, forked from one that has imported PyTorch once.

A new interpreter needs seconds to import PyTorch and open_clip; a fork needs milliseconds, and is killed, interrupted
and refused by the disk just as well. What depends on the interpreter (the modules that it imports, the encoding of its
streams) needs a new one.
"""

import os
import shutil
import signal
import sys
import tempfile
import weakref
from collections.abc import Callable, Mapping
from multiprocessing import get_context
from pathlib import Path
from typing import Any

# What training, evaluation and prediction import, and pytest, for functions that are in a module of tests.
IMPORTED_ONCE = [
    *("pytest", "maple.cli", "maple.fitting", "maple.inference.torch_predictor", "maple.train.trainer"),
    *("open_clip", "sklearn.linear_model"),
]


def forking_context() -> Any:
    """A context of multiprocessing whose processes are forks of one that has imported what they need."""
    context = get_context("forkserver")
    context.set_forkserver_preload(IMPORTED_ONCE)
    return context


class ForkedProcess:
    """A function that runs in a process of its own, with what it has written so far.

    Args:
        function: of a module that can be imported.
        arguments: of the function; they are pickled.
        environment: variables of the environment that are set or changed.
        largest_file: the size in KiB at which writing a file fails, as on a full disk.
    """

    def __init__(
        self,
        function: Callable[..., object],
        *arguments: Any,
        environment: Mapping[str, str] | None = None,
        largest_file: int | None = None,
    ) -> None:
        folder = tempfile.mkdtemp(prefix="maple-forked-")
        weakref.finalize(self, shutil.rmtree, folder)
        self._streams = [Path(folder) / name for name in ("stdout", "stderr")]
        for stream in self._streams:
            stream.touch()
        variables = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
        self._process = forking_context().Process(
            target=_run, args=(function, arguments, self._streams, variables, os.getcwd(), largest_file)
        )
        self._process.start()

    @property
    def returncode(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        return self._process.exitcode

    @property
    def stdout(self) -> str:
        return self._streams[0].read_text()

    @property
    def stderr(self) -> str:
        return self._streams[1].read_text()

    def send_signal(self, number: int) -> None:
        if self._process.exitcode is None and self._process.pid is not None:
            os.kill(self._process.pid, number)

    def kill_group(self) -> None:
        """Kill it, and all processes that it has started."""
        if self._process.exitcode is None and self._process.pid is not None:
            os.killpg(self._process.pid, signal.SIGKILL)

    def wait(self, seconds: float = 240) -> int:
        """Wait for its end and return its exit status; one that takes longer is killed."""
        self._process.join(seconds)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()
            raise TimeoutError(f"the process has not ended within {seconds} seconds: {self.stderr}")
        return self._process.exitcode


def killed_at_flush(number: int, function: Callable[[], object]) -> int:
    """Run a function in a fork of this process that kills itself at its n-th flush to the disk (0: at none).

    A flush is of a file (written, not yet in its place) or of its folder (in its place).

    Returns:
        the status of `os.waitpid`.
    """
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    flush, count = os.fsync, 0

    def fsync(descriptor: int) -> None:
        nonlocal count
        count += 1
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)
        flush(descriptor)

    os.fsync = fsync  # type: ignore[assignment]
    try:
        function()
    except BaseException as error:  # noqa: BLE001 - the fork must not continue as this process
        sys.stderr.write(f"{error!r}\n")
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def start_maple(*arguments: object, **options: Any) -> ForkedProcess:
    """Start a `maple` command; options are those of `ForkedProcess`."""
    return ForkedProcess(run_command_line, [str(argument) for argument in arguments], **options)


def run_maple(*arguments: object, **options: Any) -> ForkedProcess:
    """Run a `maple` command to its end."""
    process = start_maple(*arguments, **options)
    process.wait()
    return process


def run_command_line(arguments: list[str]) -> None:
    """Run a `maple` command in this process, to its exit."""
    from maple.cli import main

    sys.argv = ["maple", *arguments]
    main()


def _run(
    function: Callable[..., object],
    arguments: tuple[Any, ...],
    streams: list[Path],
    environment: dict[str, str],
    folder: str,
    largest_file: int | None,
) -> None:
    import resource

    import torch

    os.setsid()
    for descriptor, stream in enumerate(streams, start=1):
        opened = os.open(stream, os.O_WRONLY | os.O_APPEND)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    # As in a terminal: a shell's background job ignores SIGINT, and so would its children, these tests among them.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    if largest_file is not None:
        sys.dont_write_bytecode = True  # or a part of a compiled module would be kept as the whole of it
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file * 1024,) * 2)
    function(*arguments)
