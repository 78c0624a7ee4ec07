"""`pintail config`: every setting, its value and where to change it."""

from __future__ import annotations

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from streams.config import ENVIRONMENT_PREFIX, Settings, load_settings


def register(app: typer.Typer) -> None:
    """Adds the command to `app`."""

    @app.command()
    def config() -> None:
        """Show all settings; secrets stay hidden."""
        settings = load_settings()
        table = Table("variable", "value", "meaning", box=None)
        for name, field in Settings.model_fields.items():
            changed = getattr(settings, name) != field.default
            value = Text(str(settings.shown(name)), style="bold" if changed else "")
            table.add_row(f"{ENVIRONMENT_PREFIX}{name.upper()}", value, field.description or "")
        Console().print(table)
