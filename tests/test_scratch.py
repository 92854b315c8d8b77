"""Temporary files: one folder per process, gone at the end; folders of killed processes are removed, those of
live ones never."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from graphs import images, small_convnet

import eptq_onnx
from eptq_onnx import OutputError, scratch
from eptq_onnx.runtime import Session

HOLDER = """
import sys, time
from eptq_onnx import scratch
with scratch.folder() as folder:
    open(folder + "/weights", "w").write("x")
    print(folder, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


def test_folders_of_a_process_are_in_one_and_go_with_it(temporary):
    with scratch.folder() as a:
        with scratch.folder() as b:
            assert len({os.path.dirname(p) for p in (a, b)}) == len(list(temporary.iterdir())) == 1
            assert str(os.getpid()) in os.path.dirname(a)
        assert not os.path.exists(b)
        assert os.path.isdir(a)
    assert not list(temporary.iterdir())


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_nothing(temporary, error):
    def work() -> None:
        with scratch.folder() as folder:
            Path(folder, "half").write_text("half")
            raise error

    with pytest.raises(error):
        work()
    assert not list(temporary.iterdir())


def test_threads_share_the_folder_and_the_last_one_removes_it(temporary):
    def work(k: int) -> None:
        for _ in range(20):
            with scratch.folder() as folder:
                Path(folder, "a").write_text(str(k))
                assert Path(folder, "a").read_text() == str(k)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not list(temporary.iterdir())


def test_a_run_puts_everything_into_its_folder_and_removes_it(temporary, monkeypatch):
    from eptq_onnx.proto import store

    monkeypatch.setattr(store, "LARGE", 1000)
    seen: set[str] = set()
    real = Session.run

    def run(self, *arguments):
        seen.update(os.listdir(temporary))
        return real(self, *arguments)

    monkeypatch.setattr(Session, "run", run)
    eptq_onnx.quantize(small_convnet(), images(8), eptq_onnx.Config(preset="fast"))
    assert len(seen) == 1
    assert not list(temporary.iterdir())


def _hold(temporary: Path) -> tuple[subprocess.Popen[str], Path]:
    process = subprocess.Popen([sys.executable, "-c", HOLDER], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip()).parent


def _age(folder: Path) -> None:
    old = time.time() - 3600
    os.utime(folder, (old, old))


def test_the_folder_of_a_killed_process_is_removed_by_the_next_and_that_of_a_live_one_is_not(temporary):
    (dead, left), (live, kept) = _hold(temporary), _hold(temporary)
    dead.kill()
    dead.communicate()
    assert left.is_dir()
    for folder in (left, kept):
        _age(folder)
    with scratch.folder():
        assert not left.exists()
        assert (next(kept.iterdir()) / "weights").is_file()
    live.send_signal(signal.SIGKILL)
    live.communicate()


def test_what_looks_like_a_folder_of_ours_but_is_not_stays(temporary):
    newborn = temporary / "eptq-onnx-99999999-0123abcd"
    newborn.mkdir()
    other = temporary / "eptq-onnx-mine"
    other.mkdir()
    target = temporary / "target"
    target.mkdir()
    link = temporary / "eptq-onnx-99999999-0123abce"
    link.symlink_to(target)
    file = temporary / "eptq-onnx-99999999-0123abcf"
    file.write_text("")
    for path in (other, target, file):
        _age(path)
    with scratch.folder():
        assert all(p.exists() for p in (newborn, other, target, link, file))


def test_a_forked_child_leaves_the_folder_of_its_parent(temporary):
    with scratch.folder() as folder:
        script = """
import os, tempfile
from eptq_onnx import scratch
with scratch.folder() as mine:
    child = os.fork()
    if not child:
        with scratch.folder() as other:
            assert os.path.dirname(other) != os.path.dirname(mine)
        scratch.clear()
        os._exit(0 if os.path.isdir(mine) else 1)
    raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
        assert subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=False).returncode == 0
        assert os.path.isdir(folder)


def test_no_room_is_told_in_a_sentence(temporary, monkeypatch):
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "mkdir", full)
    with pytest.raises(OutputError, match=r"No space left on device.*TMPDIR"), scratch.folder():
        pass
