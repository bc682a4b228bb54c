"""Threads that read images before their use, in order."""

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

from maple.machine import usable_cores

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


def in_background(function: Callable[[], _Value], name: str) -> "Future[_Value]":
    """Run `function` in a thread of this name, which the end of the process does not wait for."""
    result: Future[_Value] = Future()
    result.set_running_or_notify_cancel()  # it cannot be cancelled

    def run() -> None:
        try:
            result.set_result(function())
        except BaseException as error:  # noqa: BLE001 - raised by `result`
            result.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return result


def map_in_order(
    function: Callable[[_Key], _Value],
    keys: Iterable[_Key],
    num_workers: int,
    batch_size: int,
    *,
    overlap: bool = True,
) -> Generator[_Value, None, None]:
    """Map `function` over `keys` with threads, yielding results in order, for a caller that uses `batch_size` at once.

    At most two batches are computed early, or one for each thread. Without `overlap` (see `overlaps`) it is one batch,
    which is begun when the caller has taken all of the last one and asks for more.
    With `num_workers` 0 the caller's thread does the work. `keys` may be endless: they are taken in the caller's
    thread, no more of them than are computed. An exception of `function` is raised unchanged. Close the iterator to
    stop the threads early.
    """
    if num_workers == 0:
        yield from map(function, keys)
        return
    # Threads, not processes: they share the store of decoded images, and Pillow releases the GIL while it decodes and
    # resizes.
    executor = ThreadPoolExecutor(num_workers, thread_name_prefix="maple-images")
    waiting: deque[Future[_Value]] = deque()
    remaining = iter(keys)

    def submit(count: int) -> None:
        waiting.extend(executor.submit(function, key) for key in islice(remaining, count))

    try:
        at_once = max(2 * batch_size if overlap else batch_size, num_workers)
        submit(at_once)
        while waiting:
            result = waiting.popleft().result()
            if overlap:
                submit(1)
            yield result
            if not waiting:
                submit(at_once)
    finally:
        executor.shutdown(cancel_futures=True)


def map_with_progress(
    function: Callable[[_Key], _Value],
    keys: Sequence[_Key],
    workers: int | None,
    on_done: Callable[[int, int], None],
    chunk: int = 256,
) -> Iterator[_Value]:
    """Map `function` over `keys` with `workers` threads (None: one per core, up to 16), yielding results in order.

    `on_done` is called after each chunk of results with (keys done, keys in all).
    """
    with ThreadPoolExecutor(workers or min(usable_cores(), 16)) as pool:
        for start in range(0, len(keys), chunk):
            yield from pool.map(function, keys[start : start + chunk])
            on_done(min(start + chunk, len(keys)), len(keys))


def overlaps(device: str, num_workers: int) -> bool:
    """Whether threads read on while images are encoded on a device of this type ("cpu", "cuda", ...).

    Not where they read with all cores and these encode, too: both at once take longer than one after the other, 1.4
    times as long in an evaluation with the packaged CLIP on two cores (`benchmarks.pipeline`).
    """
    return device != "cpu" or num_workers < usable_cores()


def reading_threads(workers: int | None, most: int = 4) -> int:
    """The number of threads that read: `workers`, or, if None, one per core up to `most` (none on one core)."""
    if workers is not None:
        return workers
    cores = usable_cores()
    return min(most, cores) if cores > 1 else 0
