"""The root of the error tree, and the errors that reading table files raises.

They live here because schemas/ imports nothing of streams/; `streams.errors` shows the whole tree and is where everyone
else imports them from.
"""

from __future__ import annotations

from typing import ClassVar


class PintailError(Exception):
    """Base of all operating errors. `retriable` says whether the same action may succeed later, unchanged."""

    retriable: ClassVar[bool] = False

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class ConfigurationError(PintailError):
    """Settings or table files that cannot be used as they are."""


class TableFileError(ConfigurationError):
    """A table file that cannot be used; `file`, `line` and `column` (both from 1) point at the fault."""

    def __init__(self, message: str, *, file: str, line: int = 1, column: int = 1, hint: str = "") -> None:
        super().__init__(f"{file}:{line}:{column}: {message}", hint=hint)
        self.file = file
        self.line = line
        self.column = column
