"""`python -m agents store|sink`: one worker process, configured by the environment. `pintail worker` calls it."""

from __future__ import annotations

import asyncio
import gc
import sys
from importlib.abc import MetaPathFinder
from typing import TYPE_CHECKING

from agents.memory import calm_the_garbage_collector
from streams.errors import PintailError

if TYPE_CHECKING:
    from agents.app import PintailApp

KINDS = ("store", "sink")


class _WithoutPandas(MetaPathFinder):
    """DuckDB and the ClickHouse client load pandas where it is installed. Pintail has no use for it, and half a second
    of each start and 30 MB of each worker would go into it. (None in sys.modules would not do: pyarrow takes it for a
    module.)"""

    def find_spec(self, fullname: str, path: object, target: object = None) -> None:
        """As if it were not installed."""
        del path, target
        if fullname == "pandas":
            raise ModuleNotFoundError("a worker does without pandas", name=fullname)


sys.meta_path.insert(0, _WithoutPandas())


def main(arguments: list[str]) -> int:
    """Runs the worker until SIGTERM or SIGINT; 1 for a fault in the configuration, 2 for wrong usage."""
    if len(arguments) != 1 or arguments[0] not in KINDS:
        print(f"usage: python -m agents {'|'.join(KINDS)}", file=sys.stderr)  # noqa: T201
        return 2
    # Nothing that modules make while they are loaded is garbage, and there is a lot of it to look through.
    gc.disable()
    try:
        app = _make_app(arguments[0])
        asyncio.run(app.prepare())
    except PintailError as error:
        print(f"pintail worker: {error}", file=sys.stderr)  # noqa: T201
        return 1
    import faust

    calm_the_garbage_collector()
    faust.Worker(app, loglevel="INFO", redirect_stdouts=False, quiet=True).execute_from_commandline()
    return 0


def _make_app(kind: str) -> PintailApp:
    """Loading takes a second or two, so each kind loads only what it runs (the sink needs no Redis client), and the
    store's files are opened meanwhile."""
    from agents.worker_name import hold_name
    from streams.config import load_settings

    settings = load_settings()
    hold_name(settings, kind)
    if kind == "sink":
        from agents.sink_app import sink_app

        return sink_app(settings)
    from agents.store_files import open_files

    files = open_files(settings)
    from agents.store_app import store_app

    return store_app(settings, files)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
