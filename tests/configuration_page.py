"""docs/configuration.md, made from the settings: `python -m tests.configuration_page` rewrites it.

tests/unit/test_docs.py fails while the page and `Settings` disagree.
"""

from __future__ import annotations

from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from pydantic import SecretStr
from pydantic.fields import FieldInfo

from streams.config import ENVIRONMENT_PREFIX, SETTINGS_FILE, STACK_FILE_NAME, Settings

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "configuration.md"

_INTRODUCTION = f"""# Configuration

Each setting is an environment variable, or a key of `{SETTINGS_FILE}` in the working directory (the name without
`{ENVIRONMENT_PREFIX}`, in lower case). The environment wins over the file, the file over a running local stack
(`{STACK_FILE_NAME}` below the data folder, written by `pintail dev`), that over the default. All faults are reported at
once; an unknown key in the file is one. `pintail config` shows what is in force.

| variable | default | meaning |
|---|---|---|
"""
_END = """
The jars of the local stack's Kafka are kept in `PINTAIL_CACHE`, else in `~/.cache/pintail`; `JAVA_HOME` says which Java
runs it.
"""


def page() -> str:
    """The whole page."""
    rows = (_row(name, field) for name, field in Settings.model_fields.items())
    return _INTRODUCTION + "\n".join(rows) + "\n" + _END


def _row(name: str, field: FieldInfo) -> str:
    meaning = (field.description or "").replace("|", "\\|")
    if choices := _choices(field.annotation):
        meaning += ": " + ", ".join(f"`{choice}`" for choice in choices)
    return f"| `{ENVIRONMENT_PREFIX}{name.upper()}` | {_default(field.default)} | {meaning} |"


def _choices(annotation: Any) -> tuple[str, ...]:
    return get_args(annotation) if get_origin(annotation) is Literal else ()


def _default(value: object) -> str:
    match value:
        case "" | NoneType() | SecretStr():
            return "(none)"
        case bool():
            return f"`{str(value).lower()}`"
        case Path() if value.is_relative_to(ROOT):
            return f"`{value.relative_to(ROOT)}`, as installed"
        case _:
            return f"`{value}`"


if __name__ == "__main__":
    PAGE.write_text(page())
