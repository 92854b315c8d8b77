"""The files of a workdir: whole or not there, and never taken for what they are not."""

from __future__ import annotations

import errno
import os
import shutil
from typing import Any

import numpy as np
import pytest

from eptq_onnx.errors import OutputError
from eptq_onnx.workdir import Workdir, decode, encode


@pytest.fixture
def path(tmp_path):
    return tmp_path / "w"


def _kept(path) -> tuple[str, str]:
    """A light and a heavy value, named by an entry."""
    with Workdir(path) as workdir:
        digests = encode([1, 2], workdir), encode(np.arange(50000), workdir)
        workdir.add("pass", {"values": list(digests)})
    return digests


def test_a_later_run_finds_what_an_earlier_one_kept(path):
    light, heavy = _kept(path)
    with Workdir(path) as workdir:
        [entry] = workdir.entries("pass")
        assert entry["values"] == [light, heavy]
        assert decode(light, workdir) == [1, 2]
        assert np.array_equal(decode(heavy, workdir), np.arange(50000))
        assert workdir.entries("another") == []


@pytest.mark.parametrize("harm", ["cut", "changed", "removed"])
def test_a_damaged_file_is_an_error_never_another_value(path, harm):
    digests = _kept(path)
    for file in [*(path / "objects").iterdir(), *(path / "entries" / "pass").iterdir()]:
        content = file.read_bytes()
        if harm == "removed" and file.suffix == ".json":
            continue  # forgotten, that is all
        with Workdir(path) as workdir:
            if harm == "removed":
                file.unlink()
            else:
                file.write_bytes(
                    content[: len(content) // 2]
                    if harm == "cut"
                    else content[:-2] + bytes([content[-2] ^ 1, content[-1]])
                )
            with pytest.raises(OutputError, match=r"remove the folder, and run again\.$"):
                [decode(digest, workdir) for entry in workdir.entries("pass") for digest in entry["values"]]
            file.write_bytes(content)
    with Workdir(path) as workdir:
        assert decode(digests[0], workdir) == [1, 2]


def test_what_no_entry_names_is_removed_at_the_end(path):
    _kept(path)
    with Workdir(path) as workdir:
        encode(np.arange(60000), workdir)
        assert len(list((path / "objects").iterdir())) == 5
    assert len(list((path / "objects").iterdir())) == 3
    with Workdir(path) as workdir:
        [entry] = workdir.entries("pass")
        workdir.remove("pass", entry)
    assert not list((path / "objects").iterdir())


def test_a_folder_that_is_gone_at_the_end_does_not_cost_the_result(path):
    with Workdir(path) as workdir:
        encode(np.arange(60000), workdir)
        shutil.rmtree(path)


def test_after_an_error_everything_stays(path):
    def fail():
        with Workdir(path) as workdir:
            encode(np.arange(60000), workdir)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert len(list((path / "objects").iterdir())) == 2


def test_files_of_killed_runs_are_removed(path):
    _kept(path)
    left = [
        path / "objects" / ".eptq-onnx-1-00000000.tmp",
        path / "entries" / "pass" / ".eptq-onnx-1-00000001.tmp",
    ]
    for file in left:
        file.write_bytes(b"half")
    with Workdir(path):
        assert not any(file.exists() for file in left)


def test_two_runs_at_once_are_refused(path):
    with Workdir(path), pytest.raises(OutputError, match="in use by another run"), Workdir(path):
        pass


def test_a_folder_of_other_files_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("…")
    with pytest.raises(OutputError, match="holds other files"), Workdir(tmp_path):
        pass
    with pytest.raises(OutputError, match="is no folder"), Workdir(tmp_path / "thesis.txt"):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_full_disk_is_an_error_and_leaves_no_half_file(path, monkeypatch, function):
    _kept(path)
    before = sorted(p.name for p in path.rglob("*"))

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def keep() -> None:
        with Workdir(path) as workdir:
            monkeypatch.setattr(os, function, full)
            encode(np.arange(70000), workdir)

    with pytest.raises(OutputError, match=r"No space left on device\): make room"):
        keep()
    assert sorted(p.name for p in path.rglob("*")) == before


@pytest.mark.skipif(os.getuid() == 0, reason="the superuser may write anywhere")
def test_a_folder_without_permission_is_refused(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(OutputError, match="Permission denied"), Workdir(tmp_path / "closed" / "w"):
        pass
