"""Errors that a user can fix, and the one place that prints them.

Each error is one short message: where, what is wrong, what was found, what was expected, and how to fix it.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterable, Sequence


class UserError(Exception):
    """Invalid input. Printed without a traceback unless `--debug` is given.

    Args:
        where: the flag, the file or the file:line.
        what: what is wrong, as a short clause.
        found: the value that was found.
        expected: what a valid value is.
        hint: how to fix it, as a sentence.
    """

    def __init__(
        self, where: str, what: str, *, found: object = None, expected: object = None, hint: str | None = None
    ) -> None:
        message = f"{where}: {what}"
        if found is not None:
            message += f"; found {found}"
        if expected is not None:
            message += f"{',' if found is not None else ';'} expected {expected}"
        message = message.rstrip(".") + "."
        if hint:
            message += f" {hint}"
        super().__init__(message)


class ConfigError(UserError):
    """A flag, or a key in a flag's JSON, has an invalid value."""

    def __init__(
        self,
        flag: str,
        key: str | None = None,
        *,
        what: str = "invalid value",
        found: object = None,
        expected: object = None,
        hint: str | None = None,
    ) -> None:
        where = f"--{flag}" if key is None else f"--{flag} {key}"
        super().__init__(where, what, found=found, expected=expected, hint=hint)


class DataError(UserError):
    """A data file is missing or damaged, or does not fit the model."""


class BadRecord(Exception):
    """A record of a data file is invalid. The code that reads the file knows its place and calls `at`.

    Args:
        what, found, expected, hint: as in `UserError`.
        line_offset: lines from the record's first line to the mistake.
    """

    def __init__(
        self,
        what: str,
        *,
        found: object = None,
        expected: object = None,
        hint: str | None = None,
        line_offset: int = 0,
    ) -> None:
        super().__init__(what)
        self.line_offset = line_offset
        # Only text: some objects, such as certain exceptions, cannot be sent to another process.
        self._found = None if found is None else str(found)
        self._what, self._expected, self._hint = what, expected, hint

    def at(self, where: str) -> DataError:
        """Return the error for the user; `where` is the record's file and line."""
        return DataError(where, self._what, found=self._found, expected=self._expected, hint=self._hint)

    @property
    def reason(self) -> str:
        """The message without the place."""
        return str(self.at("")).removeprefix(": ")


class CheckpointError(UserError):
    """A model, adapter or checkpoint file is missing or damaged, does not fit, or cannot be written."""


def nearest(name: str, known: Iterable[str], prefix: str = "") -> str | None:
    """Return a hint that suggests the most similar known name; None if none is similar."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"Did you mean {prefix}{close[0]}?" if close else None


def exit_with_message(main: Callable[[Sequence[str]], int | None]) -> None:
    """Run a program's `main(argv)` and exit. A UserError becomes one message on stderr and exit code 2."""
    argv = sys.argv[1:]
    try:
        sys.exit(main(argv) or 0)
    except UserError as error:
        if any(word in ("--debug", "--debug=1") for word in argv):
            raise
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)
