"""Runs in processes of their own without the seconds of imports: a warm process that forks one for each.

Started as a program it reads a JSON line of flags after another, forks, and answers with the child's pid; a line at the
child's end has its wait status. `Warm` is the other side, for tests.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import BinaryIO

ROOT = Path(__file__).resolve().parents[2]


class Warm:
    """The process that forks; a context manager."""

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
        """Begin a run; its pid.

        Args:
            flags: of train.py.
            output: file for what it prints.
            die_at: (write, fsync, replace or unlink; n): SIGKILL itself at the n-th such call. `write` is in the
                middle of a tensor of a checkpoint, the others are of any file.
        """
        message = {"flags": flags, "output": str(output), "die_at": die_at}
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def wait(self) -> int:
        """The exit code of the run begun last, negative for a signal."""
        return os.waitstatus_to_exitcode(int(self.process.stdout.readline()))

    def run(self, flags: list[str], output: Path, die_at: tuple[str, int] | None = None) -> int:
        """`start` and `wait`."""
        self.start(flags, output, die_at)
        return self.wait()


def serve() -> None:
    from rwkv_peft.training import run  # noqa: F401 (what takes the time)

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
    """One run, as train.py makes it; does not return."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    from rwkv_peft.config import flags as cli
    from rwkv_peft.errors import exit_with_message
    from rwkv_peft.training.run import run

    if die_at:
        _die_at(*die_at)
    code = 1
    try:
        exit_with_message(lambda _: run(cli.resolve(cli.parse_args(flags))))
    except SystemExit as end:
        code = end.code
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _die_at(kind: str, count: int) -> None:
    left = count

    def reached() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    if kind == "write":
        from rwkv_peft.training.checkpoint import file as checkpoints

        class HalfWay:
            """A file that writes the first half of what it gets, and then may not come to the second."""

            def __init__(self, file: BinaryIO) -> None:
                self.file = file

            def write(self, piece: memoryview) -> None:
                middle = len(piece) // 2
                self.file.write(piece[:middle])
                self.file.flush()
                reached()
                self.file.write(piece[middle:])

        write_hashed = checkpoints._write_hashed
        checkpoints._write_hashed = lambda file, parts: write_hashed(HalfWay(file), parts)
        return
    plain = getattr(os, kind)

    def dying(*arguments, **keywords):
        reached()
        return plain(*arguments, **keywords)

    setattr(os, kind, dying)


if __name__ == "__main__":
    serve()
