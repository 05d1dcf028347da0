"""Runs in their own processes, without importing everything again: a server process forks a child for each run.

As a program, this file is the server. It reads one JSON line for each run, forks, and answers with the child's process
id; when the child ends, it writes a second line with the child's wait status. `Warm` starts the server and talks to it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

ROOT = Path(__file__).resolve().parents[2]


class Warm:
    """A server process with everything imported. Use it as a context manager."""

    def __enter__(self) -> Warm:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'RWKV-PEFT'}:{ROOT}"}
        environment.pop("PL_GLOBAL_SEED", None)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.training.runs_in_children"],
            cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=60)

    def start(self, flags: list[str], output: Path, die_at: tuple[str, int] | None = None) -> int:
        """Start a run and return its process id.

        Args:
            flags: of train.py.
            output: file that receives what the run prints.
            die_at: (call, n): the run kills itself (SIGKILL) at the n-th such call. `write` stops in the middle of a
                tensor of a checkpoint; `fsync`, `replace` and `unlink` are calls on any file.
        """
        message = {"flags": flags, "output": str(output), "die_at": die_at}
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def wait(self) -> int:
        """Wait for the last run that was started and return its exit code; -N if signal N ended it."""
        return os.waitstatus_to_exitcode(int(self.process.stdout.readline()))

    def run(self, flags: list[str], output: Path, die_at: tuple[str, int] | None = None) -> int:
        """Start a run, wait for it and return its exit code."""
        self.start(flags, output, die_at)
        return self.wait()


def serve() -> None:
    """Fork a child for each line of stdin."""
    from tests.training import small_runs  # noqa: F401 (imports everything once, before the first fork)

    for line in sys.stdin:
        message = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _child(**message)
        sys.stdout.write(f"{pid}\n")
        sys.stdout.flush()
        _, status = os.waitpid(pid, 0)
        sys.stdout.write(f"{status}\n")
        sys.stdout.flush()


def _child(flags: list[str], output: str, die_at: tuple[str, int] | None) -> None:
    """Make one run as train.py does, and end the process."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    from rwkv_peft.errors import exit_with_message
    from tests.training.small_runs import train_flags

    if die_at:
        _die_at(*die_at)

    def main(_: Sequence[str]) -> None:
        train_flags(flags)

    code = 1
    try:
        exit_with_message(main)
    except SystemExit as end:
        code = end.code
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _die_at(kind: str, count: int) -> None:
    """Make this process kill itself at the `count`-th call of a kind (see `Warm.start`)."""
    left = count

    def reached() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    if kind == "write":
        from rwkv_peft.training.checkpoint import file as checkpoint_file

        class HalfWritten:
            """A file that writes each piece in two halves; the process may die between them."""

            def __init__(self, file: BinaryIO) -> None:
                self.file = file

            def write(self, piece: memoryview) -> None:
                middle = len(piece) // 2
                self.file.write(piece[:middle])
                self.file.flush()
                reached()
                self.file.write(piece[middle:])

        write_hashed = checkpoint_file._write_hashed
        checkpoint_file._write_hashed = lambda file, parts: write_hashed(HalfWritten(file), parts)
        return
    plain = getattr(os, kind)

    def dying(*arguments, **keywords):
        reached()
        return plain(*arguments, **keywords)

    setattr(os, kind, dying)


if __name__ == "__main__":
    serve()
