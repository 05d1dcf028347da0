"""Printing for people: the one place that writes to the terminal.

Results and progress go to stdout, notes and warnings to stderr. In a run of several processes only the main process
prints, so that every line appears once. A tqdm progress bar is moved out of the way.
"""

from __future__ import annotations

import os
import sys
from typing import TextIO


def is_main_process() -> bool:
    """Whether this is process 0 of a run, read from the launcher's environment variables; True without a launcher."""
    for name in ("RANK", "SLURM_PROCID"):
        if name in os.environ:
            return os.environ[name] == "0"
    return all(os.environ.get(name, "0") == "0" for name in ("LOCAL_RANK", "NODE_RANK", "CROSS_RANK"))


def say(text: str) -> None:
    """Print a line to stdout."""
    _print_line(text, sys.stdout)


def note(text: str) -> None:
    """Print `note: TEXT` to stderr: something the user may want to know."""
    _print_line(f"note: {text}", sys.stderr)


def warn(text: str) -> None:
    """Print `warning: TEXT` to stderr: something that may need action."""
    _print_line(f"warning: {text}", sys.stderr)


def _print_line(text: str, stream: TextIO) -> None:
    if not is_main_process():
        return
    if "tqdm" in sys.modules:  # without it there is no progress bar, so do not import it
        sys.modules["tqdm"].tqdm.write(text, file=stream)
    else:
        stream.write(f"{text}\n")
    stream.flush()


def program_name(command: str) -> str:
    """Return how the user started a command, for its usage line.

    Returns:
        `rwkv-peft COMMAND` for the installed program, or `python SCRIPT` for a script of a clone.
    """
    script = sys.argv[0]
    is_script = script.endswith(".py") and not script.endswith("__main__.py")
    return f"python {script}" if is_script else f"rwkv-peft {command}"
