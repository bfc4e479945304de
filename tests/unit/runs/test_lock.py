import errno
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest

from convnext_cli.errors import RunError
from convnext_cli.runs.lock import STALE_SECONDS, RunLock, _read_pid_space, is_free


def lock(path, job=None, attempt=None, told=None):
    say = (told if told is not None else []).append
    return RunLock(path, job=job, attempt=attempt, say=say)


def write_holder(path, *, silent=0.0, **changes):
    here = lock(path).holder
    fields = asdict(here) | changes
    path.write_text(json.dumps(fields))
    os.utime(path, (time.time() - silent, time.time() - silent))


def test_a_folder_is_held_for_the_block_and_free_after_it(tmp_path):
    path = tmp_path / "run" / "lock.json"

    with lock(path):
        (path.parent / "file").touch()
        with (
            pytest.raises(RunError, match=f"is being written by process {os.getpid()} on"),
            lock(path),
        ):
            pass
    assert not path.exists()
    with lock(path):
        pass


def test_a_refused_start_leaves_no_empty_folder(tmp_path):
    with lock(tmp_path / "run" / "lock.json"):
        pass

    assert not (tmp_path / "run").exists()


def test_a_lock_that_cannot_be_removed_does_not_hide_what_ended_the_run(tmp_path, monkeypatch):
    path = tmp_path / "run" / "lock.json"

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    with lock(path):
        monkeypatch.setattr(Path, "unlink", refuse)

    assert path.exists()


def test_a_folder_that_nobody_holds_is_free_and_stays_as_it_was(tmp_path):
    path = tmp_path / "run" / "lock.json"

    assert is_free(path)
    assert not path.parent.exists()
    with lock(path):
        held = path.read_text()
        assert not is_free(path)
        assert path.read_text() == held
    (tmp_path / "run").touch()  # no folder: nothing can be told
    assert not is_free(path)


def test_the_lock_of_a_process_that_is_gone_is_taken_at_once(tmp_path):
    path = tmp_path / "lock.json"
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    write_holder(path, pid=gone.pid)

    with lock(path):
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_of_two_starts_that_find_the_holder_gone_one_gets_the_folder(tmp_path, monkeypatch):
    path = tmp_path / "lock.json"
    write_holder(path, pid=0)
    is_gone = RunLock._is_gone

    def is_gone_when_the_other_is_faster(own, holder):
        if holder.pid == 0:
            write_holder(path, host="elsewhere")
            return True
        return is_gone(own, holder)

    monkeypatch.setattr(RunLock, "_is_gone", is_gone_when_the_other_is_faster)
    with pytest.raises(RunError, match="on elsewhere"), lock(path):
        pass

    assert json.loads(path.read_text())["host"] == "elsewhere"


def test_a_number_that_another_process_has_now_is_no_holder(tmp_path):
    path = tmp_path / "lock.json"
    write_holder(path, started=lock(path).holder.started - 1000)

    with lock(path):
        pass


def test_a_holder_holds_also_when_the_clock_is_set_while_it_runs(tmp_path, monkeypatch):
    path = tmp_path / "lock.json"
    boot_time = psutil._psplatform.boot_time

    with lock(path):
        monkeypatch.setattr(psutil._psplatform, "boot_time", lambda: boot_time() + 3600)
        with pytest.raises(RunError, match="is being written by"), lock(path):
            pass


def test_a_holder_from_before_the_machine_started_anew_is_waited_for(tmp_path):
    path, told = tmp_path / "lock.json", []
    space = lock(path).holder.pid_space.partition(" ")[2]
    write_holder(path, pid_space=f"another-boot {space}", silent=STALE_SECONDS - 1.5)

    with lock(path, told=told):
        pass

    assert len(told) == 1


def test_a_holder_on_another_machine_holds_while_it_gives_signs_of_life(tmp_path):
    path = tmp_path / "lock.json"
    write_holder(path, host="elsewhere")

    with pytest.raises(RunError, match="on elsewhere"), lock(path):
        pass


def test_a_clock_that_is_ahead_takes_no_lock_from_a_holder_that_lives(tmp_path, monkeypatch):
    path = tmp_path / "lock.json"
    write_holder(path, host="elsewhere")
    monkeypatch.setattr(time, "time", lambda real=time.time: real() + 10 * STALE_SECONDS)

    with pytest.raises(RunError, match="on elsewhere"), lock(path):
        pass
    assert [file.name for file in tmp_path.iterdir()] == ["lock.json"]


def test_a_machine_of_the_same_name_is_not_this_one(tmp_path):
    path = tmp_path / "lock.json"
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    other = _read_pid_space().replace(boot, "another")
    write_holder(path, pid=2**22 + 1, pid_space=other)  # no such number here
    refreshed = threading.Timer(1.5, os.utime, [path])
    refreshed.start()

    with pytest.raises(RunError, match="is being written by"), lock(path):
        pass

    refreshed.join()


def test_a_silent_holder_on_another_machine_is_waited_for_then_passed_over(tmp_path):
    path, told = tmp_path / "lock.json", []
    write_holder(path, host="elsewhere", silent=STALE_SECONDS - 1.5)

    with lock(path, told=told):
        pass

    assert len(told) == 1
    assert "no sign of life for" in told[0]


def test_a_requeued_job_takes_its_own_lock_back_on_any_machine(tmp_path):
    path = tmp_path / "lock.json"
    write_holder(path, host="elsewhere", job="17")

    with pytest.raises(RunError, match="Slurm job 17"), lock(path, job="18"):
        pass
    with lock(path, job="17", attempt="1"):
        pass


def test_two_steps_of_one_job_on_two_machines_do_not_take_the_lock_from_each_other(tmp_path):
    path = tmp_path / "lock.json"
    write_holder(path, host="elsewhere", job="17", attempt="1")

    with pytest.raises(RunError, match="Slurm job 17"), lock(path, job="17", attempt="1"):
        pass


def test_a_holder_in_another_container_of_this_host_holds_while_it_gives_signs_of_life(tmp_path):
    path = tmp_path / "lock.json"
    write_holder(path, pid=2**22 + 1, pid_space="pid:[1]", silent=5.0)  # no such number here
    refreshed = threading.Timer(1.5, os.utime, [path])
    refreshed.start()

    with pytest.raises(RunError, match="is being written by"), lock(path):
        pass

    refreshed.join()
    write_holder(path, pid_space="pid:[1]", silent=STALE_SECONDS - 1.5)  # our own number
    with lock(path):
        pass


def test_two_refused_starts_that_end_at_once_leave_no_trace(tmp_path):
    path = tmp_path / "run" / "lock.json"

    with lock(path):
        path.unlink()
        path.parent.rmdir()  # as the other one does


def test_a_damaged_lock_is_taken(tmp_path):
    path = tmp_path / "lock.json"
    path.write_text("{")

    with lock(path):
        pass
