"""Atomic writes, clean-up after killed processes, and locks."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from rwkv_peft.errors import CheckpointError, ConfigError, DataError
from rwkv_peft.files import (
    RUN_LOCK,
    LockHeld,
    atomic_write,
    check_run_folder_is_free,
    file_lock,
    lock_run_folder,
    remove_leftovers,
    temporary_path,
)

HOLDER = """
import sys, time
from pathlib import Path
from rwkv_peft.files import lock_run_folder
with lock_run_folder(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""

# ------------------------------------------------------------------------------------- atomic writes


def test_an_atomic_write_replaces_the_file_only_at_the_end(tmp_path):
    path = tmp_path / "folder" / "a.txt"
    for content in ("first", "second"):
        before = path.read_text() if path.exists() else None
        with atomic_write(path) as temporary:
            temporary.write_text(content)
            assert (path.read_text() if path.exists() else None) == before
        assert path.read_text() == content
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error_type", [CheckpointError, DataError])
def test_a_full_disk_is_one_line_and_keeps_the_old_file(tmp_path, error_type):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write() -> None:
        with atomic_write(path, error_type=error_type) as temporary:
            temporary.write_text("half")
            raise OSError(errno.ENOSPC, "No space left on device", str(temporary))

    with pytest.raises(error_type) as caught:
        write()
    assert str(caught.value) == f"{path}: cannot be written (No space left on device)."
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_other_errors_are_converted_only_if_they_are_listed(tmp_path):
    def write(error: Exception, **options) -> None:
        with atomic_write(tmp_path / "a", **options):
            raise error

    with pytest.raises(CheckpointError, match=r"cannot be written \(disk full\)"):
        write(RuntimeError("disk full\nException raised from somewhere"), write_errors=(OSError, RuntimeError))
    with pytest.raises(RuntimeError, match="a bug"):
        write(RuntimeError("a bug"))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    expected = r"file/a: cannot be written \((Not a directory|File exists)\)"
    with pytest.raises(CheckpointError, match=expected), atomic_write(tmp_path / "file" / "a"):
        pass


def test_a_file_that_its_writer_made_private_has_the_usual_mode(tmp_path):
    (tmp_path / "usual").touch()
    with atomic_write(tmp_path / "a") as temporary:
        temporary.chmod(0o600)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == stat.S_IMODE((tmp_path / "usual").stat().st_mode)


# ----------------------------------------------------------------------------------------- leftovers


def test_leftovers_of_ended_processes_are_deleted(tmp_path):
    """Files of running processes, of other machines and of other names stay, unless the caller holds the lock."""
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    own = temporary_path(tmp_path / "out.bin")
    host = own.name.split(".")[-2].rpartition("-")[0]
    left = tmp_path / f".out.bin.{host}-{ended.pid}.tmp"
    left_folder = tmp_path / f".out.folder.{host}-{ended.pid}.tmp"
    elsewhere = tmp_path / f".out.bin.elsewhere-{ended.pid}.tmp"
    others = [tmp_path / f".outer.bin.{host}-{ended.pid}.tmp", tmp_path / "out.bin", tmp_path / ".out.bin.tmp"]
    left_folder.mkdir()
    for path in (own, left, elsewhere, *others, left_folder / "half"):
        path.touch()
    remove_leftovers(tmp_path, "out.*")
    assert set(tmp_path.iterdir()) == {own, elsewhere, *others}
    remove_leftovers(tmp_path, "out.*", locked=True)
    assert set(tmp_path.iterdir()) == set(others)
    remove_leftovers(tmp_path / "missing", "*")


# --------------------------------------------------------------------------------------------- locks


def test_a_second_run_is_refused_until_the_first_is_killed(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1] / "RWKV-PEFT")}
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        for attempt in (lambda: check_run_folder_is_free(tmp_path), lambda: lock_run_folder(tmp_path).__enter__()):
            with pytest.raises(ConfigError, match=rf"--proj_dir: .* is in use by a run, process {holder.pid} on "):
                attempt()
        with pytest.raises(LockHeld, match=f"process {holder.pid} on"), file_lock(tmp_path / RUN_LOCK, wait=False):
            pass
        holder.kill()
    check_run_folder_is_free(tmp_path)
    with lock_run_folder(tmp_path):
        assert f"process {os.getpid()} on" in (tmp_path / RUN_LOCK).read_text()
    with lock_run_folder(tmp_path):
        pass


def test_waiting_for_a_lock(tmp_path):
    code = "import sys; from pathlib import Path; from rwkv_peft.files import file_lock\n"
    code += "print('asks', flush=True)\nwith file_lock(Path(sys.argv[1]), wait=True): print('has it')"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1] / "RWKV-PEFT")}
    command = [sys.executable, "-c", code, str(tmp_path / "lock")]
    with file_lock(tmp_path / "lock", wait=True):
        waiting = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        assert waiting.stdout.readline() == "asks\n"
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(timeout=0.5)
    assert waiting.communicate(timeout=30)[0] == "has it\n"


def test_a_file_system_without_locks_is_reported(tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", fail)
    with lock_run_folder(tmp_path):
        assert "cannot be locked (Operation not supported)" in capsys.readouterr().err


def test_a_run_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="--proj_dir: cannot be written"), lock_run_folder(tmp_path / "file"):
        pass


def test_the_check_creates_no_file(tmp_path):
    check_run_folder_is_free(tmp_path / "none")
    assert not (tmp_path / "none").exists()
