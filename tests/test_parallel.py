"""Which cores a run uses, and how it shares work among them."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
import pytest
from conftest import MODELS
from hypothesis import given
from hypothesis import strategies as st
from threadpoolctl import threadpool_info

import eptq_onnx
from eptq_onnx import Config, parallel
from eptq_onnx.parallel import available_cores, ordered_map, owned_threads, worker_count


def blas_threads() -> set[int]:
    return {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}


@pytest.fixture
def many_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)


def groups(monkeypatch: pytest.MonkeyPatch, folder: Path, own: str, files: dict[str, str]) -> None:
    """Make up control groups: this process's, and the files of all."""
    for name, text in {"self": own, **files}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    monkeypatch.setattr(parallel, "_CGROUPS", folder)
    monkeypatch.setattr(parallel, "_OWN_CGROUP", folder / "self")


@pytest.mark.parametrize(
    ("own", "files", "cores"),
    [
        ("0::/\n", {"cpu.max": "300000 100000\n"}, 3),
        ("0::/\n", {"cpu.max": "max 100000\n"}, 64),
        ("0::/a/b\n", {"a/cpu.max": "500000 100000\n", "a/b/cpu.max": "max 100000\n"}, 5),
        ("0::/a/b\n", {"a/cpu.max": "500000 100000\n", "a/b/cpu.max": "250000 100000\n"}, 2),
        ("0::/elsewhere\n", {"cpu.max": "50000 100000\n"}, 1),
        (
            "2:cpu,cpuacct:/a\n1:memory:/a\n0::/\n",
            {"cpu,cpuacct/a/cpu.cfs_quota_us": "400000\n", "cpu,cpuacct/a/cpu.cfs_period_us": "100000\n"},
            4,
        ),
        (
            "2:cpu:/a\n0::/\n",
            {"cpu/a/cpu.cfs_quota_us": "-1\n", "cpu/a/cpu.cfs_period_us": "100000\n"},
            64,
        ),
        ("2:cpuset:/a\n0::/\n", {"cpuset/a/cpu.max": "100000 100000\n"}, 64),
        ("0::/\n", {"cpu.max": "no numbers at all\n"}, 64),
        ("0::/\n", {}, 64),
    ],
)
@pytest.mark.usefixtures("many_cores")
def test_the_quota_of_a_container_limits_the_cores(monkeypatch, tmp_path, own, files, cores):
    groups(monkeypatch, tmp_path, own, files)
    assert available_cores() == cores


@pytest.mark.usefixtures("many_cores")
def test_the_workers_are_as_many_as_asked_for(monkeypatch, tmp_path):
    monkeypatch.setattr(parallel, "_OWN_CGROUP", tmp_path / "none")
    assert worker_count() == 8
    with owned_threads(None):
        assert worker_count() == 8
    with owned_threads(11):
        assert worker_count() == 11
        assert set(ordered_map(lambda _: worker_count(), range(3))) == {11}
    assert worker_count() == 8


def test_matrix_products_have_one_thread_and_get_theirs_back():
    before = blas_threads()
    with owned_threads(2):
        assert blas_threads() == {1}
        assert set().union(*ordered_map(lambda _: blas_threads(), range(3))) == {1}
    assert blas_threads() == before


def test_an_error_gives_matrix_products_their_threads_back():
    before = blas_threads()

    def fail() -> None:
        with owned_threads(2):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert blas_threads() == before


@given(st.lists(st.integers(), max_size=30), st.integers(1, 5))
def test_results_come_in_order_however_many_workers_there_are(items, count):
    with owned_threads(count):
        assert list(ordered_map(lambda x: -x, items)) == [-x for x in items]


def test_no_more_threads_run_than_asked_for():
    running, most, lock = 0, 0, threading.Lock()

    def work(_: int) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        np.ones((200, 200)) @ np.ones((200, 200))
        with lock:
            running -= 1

    with owned_threads(3):
        list(ordered_map(work, range(40)))
    assert most <= 3


@pytest.mark.once
@pytest.mark.parametrize("options", [{"preset": "fast"}, {"weight_bits": 4, "steps": 8}])
def test_the_bytes_do_not_depend_on_the_threads(options):
    with np.load(MODELS / "digits_calib.npz") as file:
        samples = {name: file[name][:48] for name in file.files}
    written = {
        eptq_onnx.quantize(
            MODELS / "digits_mobile.onnx", samples, Config(threads=n, **options)
        ).model.SerializeToString()
        for n in (1, 2, 4)
    }
    assert len(written) == 1
