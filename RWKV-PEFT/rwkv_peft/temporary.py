"""Names of files that are not whole yet, and what a killed process left of them."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path


def temporary(path: str | Path) -> Path:
    """Where this process writes what becomes `path`: beside it, so that the move is atomic."""
    return Path(f"{path}.{_host()}-{os.getpid()}.tmp")


def remove_leftovers(prefix: str | Path) -> None:
    """Delete the temporary files of `prefix`.* whose processes, on this machine, are gone."""
    prefix = Path(prefix)
    name = re.compile(rf"{re.escape(prefix.name)}\.[a-z.]+\.{re.escape(_host())}-(\d+)\.tmp")
    for path in prefix.parent.glob("*.tmp"):
        match = name.fullmatch(path.name)
        if match and not _runs(int(match[1])):
            path.unlink(missing_ok=True)


def _runs(process: int) -> bool:
    if os.name == "nt":
        return True  # there, a signal 0 would interrupt it
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _host() -> str:
    return re.sub(r"\W", "_", socket.gethostname())
