"""Where the commands print their tables."""

from __future__ import annotations

import sys

from rich.console import Console

_UNBOUNDED_CHARS = 10_000


def table_console() -> Console:
    """Standard output; a pipe has no width to fit, so nothing is wrapped or cut there."""
    return Console(width=None if sys.stdout.isatty() else _UNBOUNDED_CHARS)
