"""Who does what people do: for the records of holds, throttles, pauses and operations."""

from __future__ import annotations

import getpass
import socket


def actor() -> str:
    """`user@host` of this process."""
    try:
        name = getpass.getuser()
    except (OSError, KeyError):  # a container may have no such user
        name = "unknown"
    return f"{name}@{socket.gethostname()}"
