"""Share passes through a frozen tower among several computations: what they would encode one by one is one batch.

Each computation runs in a thread of its own, and only one thread runs at a time. A computation that calls `encode_text`
or `encode_image` stops there; when all of them have stopped or ended, the requested passes that have an equal
`batch_key` are run in one batch, and each computation continues with its result. So any code that calls these functions
can share its passes without knowing of it.
"""

import threading
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import copy_context
from typing import Generic, NamedTuple, Protocol, Self, TypeVar

import torch
from torch import Tensor

_Result = TypeVar("_Result")

_this_thread = threading.local()


class Pass(Protocol):
    """A requested pass through a tower."""

    @property
    def batch_key(self) -> Hashable:
        """Passes with equal keys can be run in one batch."""

    def run(self) -> Tensor:
        """Run this pass alone."""

    def run_batch(self, others: Sequence[Self]) -> list[Tensor]:
        """Run this pass and `others`, whose keys equal its own, as one: the result of each, this one's first."""


def run_or_defer(request: Pass) -> Tensor:
    """The result of a pass: run at once, or, within `share_passes`, with those of the other computations."""
    computation: _Computation[object] | None = getattr(_this_thread, "computation", None)
    return request.run() if computation is None else computation.defer(request)


def share_passes(computations: Sequence[Callable[[], _Result]]) -> list[_Result]:
    """The results of `computations`, which share their passes through a tower where these can be batched.

    The n-th pass of each is run with the n-th of the others. Computations run in turn, never at the same time; an
    exception in one ends them all and is raised here. A single computation is just called.

    Example:
        >>> share_passes([partial(method.loss, images, labels) for method in methods])
        [(tensor(1.0986), {...}), (tensor(1.0991), {...})]
    """
    if len(computations) == 1:
        return [computations[0]()]
    threads: list[_Computation[_Result]] = []
    try:
        for computation in computations:
            threads.append(_Computation(computation))
        while waiting := [thread for thread in threads if thread.advance()]:
            groups: dict[tuple[_Modes, Hashable], list[_Computation[_Result]]] = defaultdict(list)
            for thread in waiting:
                groups[thread.modes, thread.request.batch_key].append(thread)
            # In this thread: each other one would start its own pool of OpenMP threads for the large products.
            for (modes, _), group in groups.items():
                first, *others = (thread.request for thread in group)
                with _applied(modes):
                    outputs = first.run_batch(others) if others else [first.run()]
                for thread, output in zip(group, outputs, strict=True):
                    thread.answer = output
        return [thread.result for thread in threads]
    finally:
        for thread in threads:
            thread.end()


class _Modes(NamedTuple):
    """The modes of torch that every thread has for itself."""

    inference: bool
    grad: bool
    autocast: tuple[tuple[str, bool, torch.dtype], ...]


def _current_modes() -> _Modes:
    kinds = ("cpu", "cuda", "mps")
    autocast = tuple((kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds)
    return _Modes(torch.is_inference_mode_enabled(), torch.is_grad_enabled(), autocast)


@contextmanager
def _applied(modes: _Modes) -> Iterator[None]:
    current = _current_modes()
    with ExitStack() as stack:
        if modes.inference != current.inference:
            stack.enter_context(torch.inference_mode(modes.inference))
        stack.enter_context(torch.set_grad_enabled(modes.grad))  # after inference mode, which sets it too
        for kind, enabled, dtype in set(modes.autocast) - set(current.autocast):
            stack.enter_context(torch.autocast(kind, dtype, enabled))
        yield


class _Ended(BaseException):
    """Unwinds a computation whose result is not needed any more."""


class _Computation(Generic[_Result]):
    """A computation in its own thread, which runs only while `advance` waits for it: a coroutine without `await`.

    Attributes:
        request, modes: the pass that it waits for, and the modes in which it requested it.
        answer: the result of that pass, to be set before the next `advance`.
        result: the result of the computation, once `advance` has returned False.
    """

    request: Pass
    modes: _Modes
    answer: Tensor
    result: _Result

    def __init__(self, function: Callable[[], _Result]) -> None:
        self._error: BaseException | None = None
        self._finished = self._unwanted = False
        # Control is handed over by the one semaphore, and back by the other.
        self._turn, self._pause = threading.Semaphore(0), threading.Semaphore(0)
        stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None
        arguments = (self._run, function, _current_modes(), stream)
        self._thread = threading.Thread(target=copy_context().run, args=arguments, daemon=True)
        self._thread.start()

    def advance(self) -> bool:
        """Let it run to its next request, or to its end, for which this is False; raise what it raises."""
        if not self._finished:
            self._turn.release()
            self._pause.acquire()
        if self._error is not None:
            raise self._error
        return not self._finished

    def end(self) -> None:
        """End its thread, wherever that is."""
        self._unwanted = True
        self._turn.release()
        self._thread.join()

    def defer(self, request: Pass) -> Tensor:
        """In its thread: stop until the pass has been run."""
        if not self._unwanted:
            self.request, self.modes = request, _current_modes()
            self._pause.release()
            self._turn.acquire()
        if self._unwanted:
            raise _Ended
        answer = self.answer
        del self.request, self.answer  # the computation alone keeps them, and may free them
        return answer

    def _run(self, function: Callable[[], _Result], modes: _Modes, stream: torch.cuda.Stream | None) -> None:
        self._turn.acquire()
        _this_thread.computation = self
        try:
            if stream is not None:
                torch.cuda.set_stream(stream)
            if not self._unwanted:
                with _applied(modes):
                    self.result = function()
        except BaseException as error:  # noqa: BLE001 - `advance` raises it in the calling thread
            self._error = error
        self._finished = True
        self._pause.release()
