"""`pintail`: the command line. Each command lives in a module of its own and registers itself here."""

from __future__ import annotations

import logging
import sys

import typer

from streams.cli import audit, config, dev, query, recover, shell, sink, snapshots, status, tables, worker
from streams.errors import PintailError

app = typer.Typer(
    name="pintail",
    help="Keeps the tail of a Kafka log queryable.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for module in (dev, worker, status, audit, query, shell, tables, snapshots, recover, sink, config):
    module.register(app)


def main() -> None:
    """Entry point: operating errors become one clear line and exit status 1."""
    # What it logs on its way to an error of ours; without a handler, Python prints it.
    for name in ("aiokafka", "streams.adapters.kafka_librdkafka"):
        logging.getLogger(name).addHandler(logging.NullHandler())
    try:
        app()
    except PintailError as error:
        print(f"pintail: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"  what to do: {error.hint}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
