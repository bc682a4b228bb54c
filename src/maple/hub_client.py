"""How the client of the Hugging Face hub is used: without a network, only with what it has kept."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants

_lock = threading.Lock()
_offline_uses = 0
_was_offline = False


@contextmanager
def offline_if_unreachable() -> Iterator[None]:
    """Use only the hub's cache while its host name cannot be resolved.

    Raises:
        OSError: it cannot be resolved, and a file is not in the cache.
    """
    # The client itself would retry for a minute, and log each attempt.
    host = _unresolvable_host()
    try:
        with offline(host is not None):
            yield
    except OSError as error:
        if host is None:
            raise
        raise OSError(f"{host} cannot be resolved (no network?), and its files were not downloaded before.") from error


@contextmanager
def offline(active: bool = True) -> Iterator[None]:
    """Let the hub's client, and libraries that use it, read its cache only."""
    global _offline_uses, _was_offline  # the client's own setting is one for all threads
    if not active:
        yield
        return
    with _lock:
        if not _offline_uses:
            _was_offline = constants.HF_HUB_OFFLINE
        _offline_uses += 1
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        with _lock:
            _offline_uses -= 1
            if not _offline_uses:
                constants.HF_HUB_OFFLINE = _was_offline


def _unresolvable_host() -> str | None:
    host = urlsplit(constants.ENDPOINT).hostname
    if host is None or constants.HF_HUB_OFFLINE or getproxies():
        return None
    try:
        socket.getaddrinfo(host, None)
    except socket.gaierror:
        return host
    return None


def is_network_error(error: Exception) -> bool:
    """Whether `error` comes from an HTTP library; across versions of the hub's client they share no base class."""
    modules = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    return bool(modules & {"httpx", "httpx2", "httpcore", "requests", "urllib3"})
