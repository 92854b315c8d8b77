"""Whole jobs as tasks of Ray, each in a process of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from typing import Any, TypeVar

from eptq_onnx.errors import WorkerError, one_line
from eptq_onnx.parallel import available_cores
from eptq_onnx.workers.ray_link import check_installed, connect, native

J = TypeVar("J")

_RETRIES = 3
"""How often a job starts again whose process or node is gone."""


def tasks(
    function: Callable[[J], Any], jobs: Sequence[J], cores: Callable[[J], int]
) -> Iterator[tuple[int, Any]]:
    """Run jobs as tasks of Ray; see `eptq_onnx.workers.base.Backend.tasks`."""
    check_installed()
    began = connect(available_cores())
    ray: Any = import_module("ray")
    try:
        most = max((int(n["Resources"].get("CPU", 0)) for n in ray.nodes() if n["Alive"]), default=0)
        if not most:
            raise WorkerError("no worker is left: no node of the Ray cluster offers a core.")
        task = ray.remote(function)
        running = {
            task.options(num_cpus=min(cores(job), most), max_retries=_RETRIES).remote(job): k
            for k, job in enumerate(jobs)
        }
        while running:
            ready, _ = native(ray.wait, list(running), num_returns=1)
            for reference in ready:
                number = running.pop(reference)
                try:
                    yield number, native(ray.get, reference)
                except ray.exceptions.RayError as e:
                    yield number, WorkerError(f"the process of the job ended: {one_line(e)}")
    finally:
        if began:
            ray.shutdown()
