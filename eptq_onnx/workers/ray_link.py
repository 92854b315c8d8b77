"""The connection to Ray."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any, TypeVar

import psutil

from eptq_onnx.errors import InstallError, WorkerError, one_line

R = TypeVar("R")

ADDRESS = "RAY_ADDRESS"
"""Environment variable with the address of a cluster."""
_MOST_STORE = 2**32
"""Most bytes of the object store on a machine without a cluster; it takes a third of the memory, if less."""


def check_installed() -> None:
    """Check that Ray is there.

    Raises
    ------
    InstallError
        If it is not.
    """
    if find_spec("ray") is None or find_spec("cloudpickle") is None:
        raise InstallError('the workers "ray" need Ray: pip install "eptq-onnx[ray]".')


def connect(cores: int) -> bool:
    """Connect to the cluster at `ADDRESS`, or start one of ``cores`` cores here.

    Returns True if the caller must end the connection.

    Raises
    ------
    WorkerError
        If the cluster cannot be reached, or Ray does not start.
    """
    ray = import_module("ray")
    if ray.is_initialized():
        return False
    address = os.environ.get(ADDRESS)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not address:
        # By default its processes yield to everything else on the machine, as threads do not.
        os.environ.setdefault("RAY_worker_niceness", "0")
    own = {
        "num_cpus": cores,
        "object_store_memory": _store_bytes(),
        "include_dashboard": False,
    }
    try:
        if address:
            _check_reachable(address)
        with quiet():
            ray.init(
                address=address or "local",
                log_to_driver=False,
                configure_logging=False,
                logging_level=logging.ERROR,
                **({} if address else own),
            )
    except Exception as e:
        # Ray raises errors of many kinds here.
        what = f"the Ray cluster at {address} cannot be reached" if address else "Ray does not start"
        raise WorkerError(f"{what}: {one_line(e, 400)}") from e
    return True


def _check_reachable(address: str) -> None:
    """Try a connection to HOST:PORT: Ray itself would try for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()


def _store_bytes() -> int:
    memory = psutil.virtual_memory().total
    return min(_MOST_STORE, int(memory) // 3)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Ray from printing, and from taking over signals."""
    logger, handlers = logging.getLogger("ray"), {}
    level = logger.level
    logger.setLevel(logging.ERROR)
    main = threading.current_thread() is threading.main_thread()
    for name in ("SIGINT", "SIGTERM", "SIGHUP") if main else ():
        if hasattr(signal, name):
            handlers[getattr(signal, name)] = signal.getsignal(getattr(signal, name))
    try:
        yield
    finally:
        logger.setLevel(level)
        for number, handler in handlers.items():
            if handler is not None:
                signal.signal(number, handler)


def native(function: Callable[..., R], *arguments: Any, **options: Any) -> R:
    """Call a function of Ray's, and raise what a signal's handler has raised inside of it.

    Ray's native code looks for signals while it waits, and knows no exceptions but KeyboardInterrupt: others
    become the cause of a SystemError.
    """
    try:
        return function(*arguments, **options)
    except SystemError as e:
        if e.__cause__ is not None and not isinstance(e.__cause__, Exception):
            raise e.__cause__ from None
        raise
