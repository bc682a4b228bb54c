"""Locks of files, held by one process at a time, which end with the process however that ends."""

import errno
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from maple.errors import MapleError

logger = logging.getLogger(__name__)

# Of flock on NFS without a lock daemon and on some FUSE file systems. FileLock itself takes care of ENOSYS.
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP)


@contextmanager
def locked(path: Path, busy: MapleError | None = None) -> Iterator[None]:
    """Hold the lock of a file in a folder that is there; where its file system has no locks, warn and continue.

    Args:
        busy: raised if another process holds it; by default it is waited for.

    Raises:
        OSError: the file cannot be made.
    """
    lock = FileLock(path, blocking=busy is None)
    try:
        lock.acquire()
    except Timeout as error:
        raise busy or error from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        logger.warning(
            "the file system of %s has no locks (%s): do not let two processes write to this folder at the same time",
            *(path.parent, error.strerror),
        )
    try:
        yield
    finally:
        lock.release()
