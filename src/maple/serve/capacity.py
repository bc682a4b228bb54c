"""How much is held at once."""

from maple.serve.problems import Problem


class Capacity:
    """So many units, lent and given back; only the event loop's thread may use it."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.used = 0

    def lease(self) -> "Lease":
        """A lease of nothing yet."""
        return Lease(self)


class Lease:
    """What one request has taken of a capacity; `release` gives all of it back, once."""

    def __init__(self, capacity: Capacity) -> None:
        self._capacity = capacity
        self._taken = 0
        self.handed_on = False
        """Whether somebody else than the first holder releases it."""

    def take(self, count: int, full: Problem) -> None:
        """Take `count` units more.

        Raises:
            Problem: `full`, where there are not so many left.
        """
        if self._capacity.used + count > self._capacity.total:
            raise full
        self._capacity.used += count
        self._taken += count

    def release(self) -> None:
        """Give everything back."""
        self._capacity.used -= self._taken
        self._taken = 0
