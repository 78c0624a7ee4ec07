"""How a worker keeps its memory small, and the CPU that looking after it takes.

Called by __main__ once everything is imported, and by PintailApp every few seconds.
"""

from __future__ import annotations

import ctypes
import gc

#: glibc's `int malloc_trim(size_t pad)`; None with another C library.
_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)


def calm_the_garbage_collector() -> None:
    """Reading a fetch makes tens of thousands of objects that live for a moment and are in no cycle. With Python's own
    thresholds the collector looks for cycles among them, and in all that was imported, for a quarter of the CPU."""
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)
    gc.enable()


def collect_young_garbage() -> None:
    """Every connection that asyncio closes is a cycle, and so few objects do not make the collector run by itself."""
    gc.collect(0)


def return_freed_memory() -> None:
    """Gives the pages that nothing uses back to the system; takes some milliseconds, without the interpreter's lock.

    glibc keeps what was freed below a piece still in use: after a backlog of 10 million records, 560 MiB."""
    if _malloc_trim is not None:
        _malloc_trim(0)
