"""The files of a store worker: what is opened first, while the rest of the worker is loaded.

Imports no more than that takes. Called by agents/__main__.py, for agents/store_app.py.
"""

from __future__ import annotations

from typing import NamedTuple

from schemas.catalog import Catalog, load_catalog
from streams.adapters.duckdb_store import DuckDBStore
from streams.config import Settings
from streams.processes.opening_ahead import OpeningAhead


class StoreFiles(NamedTuple):
    """The store, and what is being opened in it."""

    catalog: Catalog
    store: DuckDBStore
    ahead: OpeningAhead


def open_files(settings: Settings) -> StoreFiles:
    """Begins to open what this worker has. Raises ConfigurationError."""
    settings.require("kafka", "redis", "snapshot_key")
    catalog = load_catalog(settings.tables_dir)
    store = DuckDBStore(
        settings.store_dir, catalog, memory_limit=settings.store_memory_limit, threads=settings.store_threads
    )
    return StoreFiles(catalog, store, OpeningAhead(store))
