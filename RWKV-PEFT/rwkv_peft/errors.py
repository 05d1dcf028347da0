"""Mistakes a user can mend, and the one place that prints them.

Every such error is one short message: where, what, found, expected, and the way out.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterable, Sequence


class UserError(Exception):
    """Bad input. Shown without a traceback unless `--debug` is given.

    Args:
        where: the flag, file or file:line at fault.
        what: what is wrong, as a short clause.
        found: what was there.
        expected: what would have been right.
        hint: what to do about it.
    """

    def __init__(
        self, where: str, what: str, *, found: object = None, expected: object = None, hint: str | None = None
    ) -> None:
        message = f"{where}: {what}"
        if found is not None:
            message += f"; found {found}"
        if expected is not None:
            message += f"{',' if found is not None else ';'} expected {expected}"
        message += "."
        if hint:
            message += f" {hint}"
        super().__init__(message)


class ConfigError(UserError):
    """A flag (or a key of a flag's JSON) has a value that cannot be used."""

    def __init__(
        self,
        flag: str,
        key: str | None = None,
        *,
        what: str = "bad value",
        found: object = None,
        expected: object = None,
        hint: str | None = None,
    ) -> None:
        where = f"--{flag}" if key is None else f"--{flag} {key}"
        super().__init__(where, what, found=found, expected=expected, hint=hint)


class DataError(UserError):
    """A data file is missing, damaged or does not fit the model."""


class BadRecord(Exception):
    """A record of a data file cannot be used. Whoever reads the file knows where it is, and tells the user.

    Args:
        lines_down: how many lines below the record's first line the mistake is.
    """

    def __init__(
        self,
        what: str,
        *,
        found: object = None,
        expected: object = None,
        hint: str | None = None,
        lines_down: int = 0,
    ) -> None:
        super().__init__(what)
        self.lines_down = lines_down
        # Text alone travels between processes: not every exception, for one, survives that.
        self._found = None if found is None else str(found)
        self._what, self._expected, self._hint = what, expected, hint

    def at(self, where: str) -> DataError:
        return DataError(where, self._what, found=self._found, expected=self._expected, hint=self._hint)

    @property
    def reason(self) -> str:
        """The message without a place."""
        return str(self.at("")).removeprefix(": ")


class CheckpointError(UserError):
    """A model or adapter file is missing, damaged or does not fit."""


def nearest(name: str, known: Iterable[str], prefix: str = "") -> str | None:
    """A hint at the known name that `name` was probably meant to be; None where none is near."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"Did you mean {prefix}{close[0]}?" if close else None


def exit_with_message(main: Callable[[Sequence[str]], int | None]) -> None:
    """Run a program's `main(argv)`; turn a UserError into one message on stderr and exit code 2."""
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
