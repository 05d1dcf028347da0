"""Safe files: atomic writes, locks between processes, and the clean-up after killed processes.

Linux and macOS only. Does not import torch, so that the converter starts fast.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path

from rwkv_peft.console import note
from rwkv_peft.errors import CheckpointError, ConfigError, UserError

# ------------------------------------------------------------------------------------- atomic writes


class AtomicFile:
    """A file that appears under its name only when it is complete.

    Its content goes to a temporary file in the same folder, which is then flushed and renamed. Other processes see the
    old file or the new file, never a part of one, even after a power cut. A killed process leaves its temporary file;
    `remove_leftovers` deletes it.

    Args:
        path: the final name. Its folder is created.
    Raises:
        OSError: from any method, as the file system reports it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.temporary = temporary_path(self.path)
        """Where to write the content."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.temporary.touch()
        self._mode = self.temporary.stat().st_mode

    def sync(self) -> None:
        """Flush the content to the disk. The writer must have closed the file before."""
        self.temporary.chmod(self._mode)  # some writers make the file private
        with self.temporary.open("rb+") as handle:
            os.fsync(handle.fileno())

    def replace(self) -> None:
        """Give the file its final name. A file of that name is replaced."""
        os.replace(self.temporary, self.path)
        sync_folder(self.path.parent)

    def discard(self) -> None:
        """Delete the temporary file if it still exists."""
        with suppress(OSError):
            self.temporary.unlink(missing_ok=True)


@contextmanager
def atomic_write(
    path: str | Path,
    *,
    error_type: type[UserError] = CheckpointError,
    write_errors: tuple[type[Exception], ...] = (OSError,),
) -> Iterator[Path]:
    """Write a file completely or not at all: yields a temporary path, which is renamed to `path` at the end.

    Args:
        path: the final name. Its folder is created.
        error_type: what to raise if the file cannot be written.
        write_errors: how the code inside the `with` reports a failed write, for example on a full disk.
    Raises:
        error_type: the folder cannot be written, or the disk is full. The old file is unchanged.
    """
    try:
        file = AtomicFile(path)
        try:
            yield file.temporary
            file.sync()
            file.replace()
        finally:
            file.discard()
    except write_errors as error:
        reason = getattr(error, "strerror", None) or str(error).strip().split("\n")[0]
        raise error_type(str(path), f"cannot be written ({reason})") from error


def sync_folder(folder: Path) -> None:
    """Flush a folder to the disk, so that renamed and deleted files in it stay so after a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --------------------------------------------------------------------------------- temporary files

_TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?P<host>\w+)-(?P<pid>\d+)\.tmp")


def temporary_path(path: Path) -> Path:
    """Name of the file or folder that this process renames to `path` when it is complete."""
    return path.with_name(f".{path.name}.{_host()}-{os.getpid()}.tmp")


def remove_leftovers(folder: Path, names: str, *, locked: bool = False) -> None:
    """Delete the temporary files and folders that killed processes left in `folder`.

    Args:
        folder: may be missing.
        names: pattern of the final names, with the wildcards of `fnmatch`.
        locked: the caller holds a lock that every writer of these names must hold, so all of them are leftovers.
            Otherwise, deletes only files whose process ran on this machine and has ended.
    """
    for path in folder.glob(".*.tmp"):
        match = _TEMPORARY.fullmatch(path.name)
        if match is None or not fnmatchcase(match["name"], names):
            continue
        if locked or (match["host"] == _host() and not _is_running(int(match["pid"]))):
            _delete(path)


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
        return
    with suppress(OSError):  # the next call tries again
        path.unlink()


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's process
        return True
    return True


def _host() -> str:
    return re.sub(r"\W", "_", os.uname().nodename)


# ------------------------------------------------------------------------------------------- locks


class LockHeld(Exception):
    """Another process holds the lock. The message names it."""


class LocksUnsupported(OSError):
    """The file system has no locks, like some network file systems."""


@contextmanager
def file_lock(path: Path, *, wait: bool) -> Iterator[None]:
    """Hold the exclusive lock of a file, which is created if necessary and never deleted.

    The system releases the lock when the process ends, however it ends. The file names the last holder.

    Args:
        path: the lock's file.
        wait: wait until the lock is free.
    Raises:
        LockHeld: another process holds the lock (only without `wait`).
        LocksUnsupported: the file system has no locks.
        OSError: the file cannot be created.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            file.seek(0)
            raise LockHeld(file.read() or "another process") from None
        except OSError as error:
            raise LocksUnsupported(error.errno, error.strerror) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}")
        file.flush()
        yield


RUN_LOCK = "checkpoints/lock"
"""The lock of a run, relative to its folder."""


@contextmanager
def lock_run_folder(folder: Path) -> Iterator[None]:
    """Keep other runs out of a run's folder (`--proj_dir`).

    Raises:
        ConfigError: another run uses the folder, or it cannot be written.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(file_lock(folder / RUN_LOCK, wait=False))
        except LockHeld as holder:
            what = f"{folder} is in use by a run, {holder}"
            hint = "Wait for that run, stop it, or choose another folder."
            raise ConfigError("proj_dir", what=what, hint=hint) from None
        except LocksUnsupported as error:
            note(f"{folder} cannot be locked ({error.strerror}): a second run in this folder would not be detected")
        except OSError as error:
            raise ConfigError("proj_dir", what=f"cannot be written: {error}") from error
        yield


def check_run_folder_is_free(folder: Path) -> None:
    """Raise ConfigError if a run uses the folder. Creates no file."""
    path = folder / RUN_LOCK
    if path.exists() and os.access(path, os.W_OK):
        with lock_run_folder(folder):
            pass
