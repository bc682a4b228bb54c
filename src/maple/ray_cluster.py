"""Connect to a Ray cluster, and size what runs on it; for sweeps and for predictions of many images."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from maple.errors import ConfigError, first_line


def require_ray(*packages: str) -> None:
    """Raise ConfigError unless Ray is installed, with the packages that a part of it needs."""
    if missing := [name for name in ("ray", *packages) if find_spec(name) is None]:
        raise ConfigError(
            f"--executor ray needs {' and '.join(missing).replace('ray', 'Ray')}, on every machine: "
            "pip install 'maple-clip[ray]'"
        )


@contextmanager
def connection(address: str | None) -> Iterator[None]:
    """Use the cluster that this process is connected to; otherwise connect, and disconnect at the end.

    Args:
        address: as for `ray.init`: auto, HOST:6379, ray://HOST:10001. By default RAY_ADDRESS, a cluster that is running
            on this machine, or a new one on this machine alone.

    Raises:
        ConfigError: there is no such cluster, or none can be started.

    Example:
        >>> with connection("auto"):
        ...     print(ray.cluster_resources())
    """
    import ray

    if ray.is_initialized():
        yield
        return
    # No usage statistics: a cluster on this machine alone sends nothing anywhere.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray.init(address=address, log_to_driver=False, logging_level="error")
    except Exception as error:  # a cluster that does not start in time raises a bare one
        problem = "a Ray cluster cannot be started" if address is None else f"no Ray cluster answers at {address!r}"
        raise ConfigError(
            f"{problem}: {first_line(error)}; start one with `ray start --head` and give --ray-address HOST:6379, or "
            "auto on one of its machines"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def reserved_gpus(gpus: float | None, cpus: float, *, default: float, user: str) -> float:
    """Return the number of GPUs that each user reserves: `gpus`, or `default` where a machine has any.

    Args:
        gpus, cpus: GPUs (a fraction of one, or whole ones) and cores of each user.
        user: what reserves them, as in the options `--gpus-per-USER` and `--cpus-per-USER`.

    Raises:
        ConfigError: no machine of the connected cluster has room for one.
    """
    import ray

    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    most_gpus, most_cpus = (max((room.get(kind, 0.0) for room in machines), default=0.0) for kind in ("GPU", "CPU"))
    if gpus is None:
        gpus = default if most_gpus else 0.0
    if not 0 < cpus <= most_cpus:
        raise ConfigError(
            f"--cpus-per-{user} {cpus:g}: each {user} takes more than 0, and the machine with most cores has "
            f"{most_cpus:g}"
        )
    allowed_fraction = gpus <= 1 or gpus == int(gpus)
    if not (0 <= gpus <= most_gpus and allowed_fraction):
        raise ConfigError(
            f"--gpus-per-{user} {gpus:g}: each {user} takes a fraction of a GPU, or whole ones; the machine with most "
            f"has {most_gpus:g}"
        )
    return gpus
