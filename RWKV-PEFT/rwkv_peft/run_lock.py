"""One run at a time in a folder."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from rwkv_peft.errors import ConfigError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK = "checkpoints/lock"
"""The file, below the run's folder. It stays; what counts is who holds it."""


@contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Hold the folder's lock. The system drops it with the process, however that ends; Windows has none.

    Raises:
        ConfigError: another process holds it, or the folder cannot be written to.
    """
    path = folder / LOCK
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise ConfigError("proj_dir", what=f"cannot be written: {error}") from error
    with file:
        _take(file, folder)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def check_unlocked(folder: Path) -> None:
    """Raise ConfigError where a run is on in the folder; makes nothing."""
    path = folder / LOCK
    if path.exists() and os.access(path, os.W_OK):
        with path.open("a+", encoding="utf-8") as file:
            _take(file, folder)


def _take(file: IO[str], folder: Path) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read() or "another process"
        what = f"{folder} is in use by a run, {holder}"
        raise ConfigError("proj_dir", what=what, hint="Wait for it, stop it, or name another folder.") from None
    except OSError as error:  # some network file systems
        sys.stderr.write(f"note: {folder} cannot be locked ({error}): a second run there would not be noticed\n")
