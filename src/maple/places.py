"""Where the package keeps what it remembers for a user, and what can be computed again."""

import os
from contextlib import suppress
from pathlib import Path

CACHE_VARIABLE = "MAPLE_CACHE"
OFF = "off"
"""The value of the variable that keeps nothing."""


def cache_folder() -> Path | None:
    """The folder of what can be computed again: `$MAPLE_CACHE`, else `maple` in `$XDG_CACHE_HOME` or in `~/.cache`.

    None if the variable is "off", or there is no home.

    Example:
        >>> cache_folder()
        PosixPath('/home/ada/.cache/maple')
    """
    given = os.environ.get(CACHE_VARIABLE, "").strip()
    if given.lower() == OFF:
        return None
    with suppress(RuntimeError):
        if given:
            return Path(given).expanduser()
        base = Path(os.environ.get("XDG_CACHE_HOME") or "")
        return (base if base.is_absolute() else Path.home() / ".cache") / "maple"
    return None


def state_folder() -> Path | None:
    """The folder `maple` in `$XDG_STATE_HOME`, by default in `~/.local/state`; None without a home.

    Example:
        >>> state_folder()
        PosixPath('/home/ada/.local/state/maple')
    """
    with suppress(RuntimeError):
        state = Path(os.environ.get("XDG_STATE_HOME") or "")
        return (state if state.is_absolute() else Path.home() / ".local" / "state") / "maple"
    return None
