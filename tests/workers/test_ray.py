from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MODELS
from graphs import images, silent, small_convnet

from eptq_onnx import Config, GradientError, ModelError, quantize
from eptq_onnx.errors import InstallError, WorkerError
from eptq_onnx.parallel import ordered_map, paired_map
from eptq_onnx.runtime import Session
from eptq_onnx.workers import employed, ray_link, ray_nodes

ray = pytest.importorskip("ray", reason="Ray is not installed here")
pytest.importorskip("cloudpickle", reason="cloudpickle is not installed here")

pytestmark = pytest.mark.filterwarnings("ignore")  # those of Ray

MEMORY = 2**28
"""Bytes of each node's object store."""


@pytest.fixture(scope="module")
def cluster():
    """Nodes of one core each, on this machine, next to a head without any."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_niceness", "0")
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (MODELS.parent, MODELS.parent / "tests"))))
        patch.setattr(ray_nodes, "_REFRESH", 0.5)
        head = {"num_cpus": 0, "object_store_memory": MEMORY, "include_dashboard": False}
        found = Cluster(initialize_head=True, head_node_args=head)
        with ray_link.quiet():
            ray.init(address=found.address, log_to_driver=False, logging_level="ERROR")
        yield found
        ray.shutdown()
        found.shutdown()


@pytest.fixture
def nodes(cluster):
    """Return a function that adds nodes; they are gone after the test."""
    added = []

    def add(count: int = 1):
        for _ in range(count):
            added.append(cluster.add_node(num_cpus=1, object_store_memory=MEMORY))
        cluster.wait_for_nodes()
        return added

    yield add
    for node in added:
        if node in cluster.worker_nodes:
            cluster.remove_node(node)
    deadline = time.monotonic() + 30
    while any(n["Alive"] and n["Resources"].get("CPU") for n in ray.nodes()) and time.monotonic() < deadline:
        time.sleep(0.1)


@pytest.fixture(autouse=True)
def _all_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """However short it takes."""
    monkeypatch.setattr(ray_nodes, "WORTH", 0.0)


def written(name: str, workers: str, progress=silent, **options) -> bytes:
    """The model that a short run through all passes writes."""
    with np.load(MODELS / f"{name.split('_', maxsplit=1)[0]}_calib.npz") as file:
        data = {key: values[:24] for key, values in file.items()}
    config = Config(
        **{"weight_bits": 4, "steps": 3, "batch_size": 8, "score_samples": 16, "workers": workers, **options}
    )
    return quantize(MODELS / f"{name}.onnx", data, config, progress=progress).model.SerializeToString()


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("digits_mobile", 2),
        pytest.param("digits_mobile", 4, marks=pytest.mark.slow),
        pytest.param("digits_resnet", 2, marks=pytest.mark.slow),
        pytest.param("shapes_detector", 2, marks=pytest.mark.slow),
        pytest.param("shapes_segmenter", 2, marks=pytest.mark.slow),
    ],
)
def test_nodes_write_the_same_bytes_as_threads(name, count, nodes):
    nodes(count)
    assert written(name, "ray") == written(name, "threads")


def test_results_come_in_order_and_hold_large_arrays(nodes):
    nodes(2)
    big = np.random.default_rng(0).random((64, 4096))
    items: list[Any] = [{"k": k, "rows": big[k % 64 :]} for k in range(40)]
    with employed("ray", 1):
        found = list(paired_map(lambda item: (item["k"], item["rows"] * 2), items, dict))
        again = list(ordered_map(lambda pair: pair[1].sum(), [result for _, result in found]))
    for item, (k, rows) in found:
        assert k == item["k"]
        np.testing.assert_array_equal(rows, item["rows"] * 2)
    assert again == [(item["rows"] * 2).sum() for item in items]


@pytest.mark.parametrize("kind", [ModelError, GradientError, ZeroDivisionError])
def test_errors_are_those_of_the_function(kind, nodes):
    nodes()

    def fail(k: int) -> int:
        if k == 3:
            raise kind("the third")
        return k

    with employed("ray", 1):
        found = ordered_map(fail, range(6))
        assert [next(found) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(kind, match="the third"):
            next(found)
        assert list(ordered_map(lambda k: k + 1, range(3))) == [1, 2, 3]


def test_what_onnxruntime_refuses_there_is_told(nodes):
    nodes()
    with employed("ray", 1):
        session = Session(small_convnet())
        with pytest.raises(ModelError, match="onnxruntime cannot run the model"):
            list(ordered_map(session.run, [{"image": images(1)[:, :1]}]))


def test_a_process_that_is_killed_is_replaced(nodes):
    nodes()
    pids = []

    def work(k: int) -> tuple[int, int]:
        time.sleep(0.05)
        return k, os.getpid()

    with employed("ray", 1):
        for k, pid in ordered_map(work, range(30)):
            if k == 5:
                os.kill(pid, signal.SIGKILL)
            pids.append(pid)
    assert len(pids) == 30
    assert len(set(pids)) == 2


def test_a_batch_that_ends_every_process_is_given_up(nodes):
    nodes()

    def work(k: int) -> int:
        if k == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return k

    with employed("ray", 1), pytest.raises(WorkerError, match="ended while they worked on the same batch"):
        list(ordered_map(work, range(6)))


def killed_at(step: str, act) -> tuple[object, list[str]]:
    """Return a progress that does something once, behind the first report of a pass, and what it did."""
    done: list[str] = []

    def progress(name, count, total, detail=""):
        if name == step and not done:
            done.append(name)
            act()

    return progress, done


def kill_a_process() -> None:
    """Kill one of the processes that work, as the system would."""
    found = [int(p) for p in os.listdir("/proc") if p.isdigit() and is_actor(Path("/proc") / p)]
    os.kill(found[0], signal.SIGKILL)


def is_actor(folder: Path) -> bool:
    try:
        return b"ray::Actor" in (folder / "cmdline").read_bytes()
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize(
    "step", ["score", "calibrate", "float fallback", "reconstruct", "optimize", "verify"]
)
def test_a_process_killed_in_each_pass_changes_no_byte(step, nodes):
    nodes(2)
    progress, done = killed_at(step, kill_a_process)
    assert written("digits_mobile", "ray", progress) == written("digits_mobile", "threads")
    assert done


def test_a_node_that_leaves_in_the_loop_changes_no_byte(cluster, nodes):
    added = nodes(2)
    progress, done = killed_at("optimize", lambda: cluster.remove_node(added[0], allow_graceful=False))
    assert written("digits_mobile", "ray", progress) == written("digits_mobile", "threads")
    assert done


def test_a_node_that_comes_gets_work(nodes):
    nodes()

    def work(k: int) -> int:
        time.sleep(0.05)
        return os.getpid()

    seen = set()
    with employed("ray", 1):
        for k, pid in enumerate(ordered_map(work, range(1500))):
            seen.add(pid)
            if k == 3:
                nodes()
            if len(seen) > 1:
                break
    assert len(seen) == 2


def test_a_run_without_a_worker_is_told_and_goes_on_from_its_workdir(cluster, nodes, tmp_path):
    added = nodes(1)
    progress, done = killed_at("reconstruct", lambda: cluster.remove_node(added[0], allow_graceful=False))
    with pytest.raises(WorkerError, match="no worker is left"):
        written("digits_mobile", "ray", progress, workdir=tmp_path / "kept")
    assert done
    assert written("digits_mobile", "threads", workdir=tmp_path / "kept") == written(
        "digits_mobile", "threads"
    )


def test_a_cluster_without_cores_is_told(cluster):
    with pytest.raises(WorkerError, match="no worker is left"), employed("ray", 1):
        pass


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nowhere.invalid:6379"])
def test_a_wrong_address_is_told_at_once(address, monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setenv(ray_link.ADDRESS, address)
    told = f"the Ray cluster at {address} cannot be reached"
    with pytest.raises(WorkerError, match=told), employed("ray", 1):
        pass


def test_what_is_missing_is_told(monkeypatch):
    monkeypatch.setattr(ray_link, "find_spec", lambda _: None)
    with pytest.raises(InstallError, match=r'pip install "eptq-onnx\[ray\]"'), employed("ray", 1):
        pass


# A background job, which these tests may be part of, inherits that SIGINT is ignored.
COMMAND = """
import runpy, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_module("eptq_onnx", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_command_leaves_no_process(number, tmp_path):
    script = [sys.executable, "-c", COMMAND, "quantize", str(MODELS / "shapes_segmenter.onnx")]
    options = ["--data", str(MODELS / "shapes_calib.npz"), "-o", str(tmp_path / "x.onnx"), "--workers", "ray"]
    environment = {n: v for n, v in os.environ.items() if n != ray_link.ADDRESS}
    process = subprocess.Popen(
        [*script, *options, "--steps", "500", "--threads", "1"],
        env={**environment, "PYTHONPATH": str(MODELS.parent)},
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not (started := descendants(process.pid, b"ray::Actor.run")) and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(number)
    _, messages = process.communicate(timeout=60)
    assert started
    assert process.returncode == 128 + number
    assert messages.strip().splitlines()[-1].endswith("nothing was written")
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in started) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not [pid for pid in started if Path(f"/proc/{pid}").exists()]


def descendants(parent: int, name: bytes) -> list[int]:
    import psutil

    try:
        found = psutil.Process(parent).children(recursive=True)
    except psutil.Error:
        return []
    return [p.pid for p in found if name in " ".join(_command(p)).encode()]


def _command(process) -> list[str]:
    import psutil

    try:
        return process.cmdline()
    except psutil.Error:
        return []
