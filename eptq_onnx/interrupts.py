"""Ctrl-C and SIGTERM: unwind, remove temporary files, print one line, and exit with the signal's code.

The first signal raises `Interrupted` in the main thread. A long native call unwinds only when it returns, and
a second signal does not wait for it: a thread of its own, woken by the operating system's signal, cleans up
and ends the process. It also does so a few seconds after the first signal. This module imports little,
because signals may arrive before everything is imported.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from eptq_onnx import scratch

GRACE = 5.0
"""Seconds from the first signal to the forced end of the process."""
_SIGNALS = {int(getattr(signal, name)) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)}


class Interrupted(BaseException):
    """Raised when a signal asks the process to end.

    Not a KeyboardInterrupt: libraries catch that, and exit with codes of their own.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    @property
    def exit_code(self) -> int:
        """Exit code as shells use it: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + self.number

    def __str__(self) -> str:
        return (
            "interrupted" if self.number == signal.SIGINT else f"ended by {signal.Signals(self.number).name}"
        )


class _Command:
    """State shared by the main thread and the thread that watches signals."""

    def __init__(self) -> None:
        self.active = self.raised = self.over = False
        self.outcome = "nothing was written"
        self.closing: list[Callable[[], object]] = []
        self._ending = threading.Lock()
        self._former_hook: Any = sys.unraisablehook
        self._source: socket.socket | None = None
        self._sink: socket.socket | None = None

    def listen(self) -> None:
        """Handle the signals that the process does not ignore; background jobs ignore Ctrl-C."""
        self.active = True
        self._source, self._sink = socket.socketpair()
        self._sink.setblocking(False)
        for number in _SIGNALS:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                signal.signal(number, self._handle)
        signal.set_wakeup_fd(self._sink.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(self._source,), daemon=True, name="signals").start()
        sys.unraisablehook = self._unraisable

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.over:
            os._exit(128 + number)
        if not self.raised:
            self.raised = True
            raise Interrupted(number)

    def _unraisable(self, report: sys.UnraisableHookArgs) -> None:
        # Raised in a destructor or a callback, where exceptions are lost.
        if isinstance(report.exc_value, Interrupted):
            self.end(report.exc_value)
        self._former_hook(report)

    def _watch(self, source: socket.socket) -> None:
        first: Interrupted | None = None
        while True:
            try:
                number = source.recv(1)[0]
            except TimeoutError:
                self.end(first or Interrupted(signal.SIGTERM))
            if number not in _SIGNALS:
                continue
            if first is not None:
                self.end(Interrupted(number))
            first = Interrupted(number)
            source.settimeout(GRACE)

    def end(self, interrupted: Interrupted) -> NoReturn:
        """Clean up and end the process, from any thread."""
        with self._ending:
            for act in (*self.closing, scratch.clear):
                with contextlib.suppress(Exception):
                    act()
            if not self.over:
                self._tell(interrupted)
            os._exit(interrupted.exit_code)

    def _tell(self, interrupted: Interrupted) -> None:
        text = f"{interrupted}: {self.outcome}\n".encode(
            getattr(sys.stderr, "encoding", None) or "utf-8", "replace"
        )
        with contextlib.suppress(OSError):
            os.write(2, text)


_command = _Command()


def tell_outcome(outcome: str) -> None:
    """Set what an interrupted process reports from now on, such as what it has written."""
    _command.outcome = outcome


@contextmanager
def closing(act: Callable[[], object]) -> Iterator[None]:
    """Call ``act`` if the process ends without unwinding from the block."""
    _command.closing.append(act)
    try:
        yield
    finally:
        _command.closing.remove(act)


@contextmanager
def command() -> Iterator[None]:
    """Treat the block as one command: a signal ends the process, and no temporary file stays.

    Only for the main thread; nested blocks do nothing. Handlers are not restored: after the block a signal
    ends the process at once.
    """
    if _command.active:
        yield
        return
    try:
        _command.listen()
        yield
    except Interrupted as e:
        # Not sys.exit, which waits for threads that may be in the midst of a batch.
        _command.end(e)
    finally:
        scratch.clear()
        _command.over = True
