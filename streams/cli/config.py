"""`pintail config`: every setting, its value and what it means."""

from __future__ import annotations

import typer
from rich.console import Console
from rich.text import Text

from streams.config import ENVIRONMENT_PREFIX, Settings, load_settings


def register(app: typer.Typer) -> None:
    """Adds the command to `app`."""

    @app.command()
    def config() -> None:
        """Show all settings; secrets stay hidden."""
        print_settings(load_settings())


def print_settings(settings: Settings) -> None:
    """One line a setting, never cut or wrapped by us: names and values are there to be copied."""
    rows = [("variable", "value", "meaning")]
    for name, field in Settings.model_fields.items():
        rows.append((f"{ENVIRONMENT_PREFIX}{name.upper()}", shown(settings, name), field.description or ""))
    styles = ["", *("bold" if name in settings.model_fields_set else "" for name in Settings.model_fields)]
    names_chars, values_chars = (max(len(row[column]) for row in rows) for column in (0, 1))
    console = Console(highlight=False)
    for (name, value, meaning), style in zip(rows, styles, strict=True):
        line = Text.assemble(f"{name:<{names_chars}}  ", (f"{value:<{values_chars}}", style), f"  {meaning}")
        console.print(line, soft_wrap=True)


def shown(settings: Settings, name: str) -> str:
    """A setting's value as text; empty for one that is not set."""
    value = settings.shown(name)
    if name == "snapshot_key" and name not in settings.model_fields_set:
        return ""  # at most, its file is set
    return "" if value is None else str(value)
