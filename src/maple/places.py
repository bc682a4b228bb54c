"""Where the package keeps what it remembers for a user."""

import os
from contextlib import suppress
from pathlib import Path


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
