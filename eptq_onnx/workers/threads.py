"""Threads of this process."""

from __future__ import annotations

from eptq_onnx.parallel import Threads, Workers
from eptq_onnx.workers.base import Backend


class ThreadBackend(Backend):
    """Threads of this process, as many as the option ``threads`` says."""

    name = "threads"
    about = "threads of this process"

    def start(self) -> Workers:
        """See `Backend.start`."""
        return Threads()
