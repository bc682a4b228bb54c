"""Threads that read ahead, and results that come in order."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


def map_in_order(
    function: Callable[[_Key], _Value], keys: Iterable[_Key], num_workers: int, ahead: int
) -> Generator[_Value, None, None]:
    """Map `function` over `keys`, in their order, at most `ahead` results early; an exception comes out unchanged.

    `num_workers` threads do it; with 0 the caller's thread. `keys` are taken one by one, in the caller's thread, so
    they may be endless. Close the iterator to stop the threads early.
    """
    if num_workers == 0:
        yield from map(function, keys)
        return
    # Threads, not processes: they share the store of decoded images, and decoding and resizing release the lock.
    executor = ThreadPoolExecutor(num_workers, thread_name_prefix="maple-images")
    waiting: deque[Future[_Value]] = deque()
    remaining = iter(keys)
    try:
        waiting.extend(executor.submit(function, key) for key in islice(remaining, max(ahead, num_workers)))
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(executor.submit(function, key) for key in islice(remaining, 1))
            yield result
    finally:
        executor.shutdown(cancel_futures=True)
