"""Ctrl-C and SIGTERM: the work unwinds, temporary files go, one line says so, and the exit code tells the
signal.

The first signal raises `Interrupted` in the main thread. Work inside a long native call unwinds only when
that returns, and a second signal does not wait for it: a thread of its own, which the operating system's
signal wakes, then cleans up and ends the process. So it does a few seconds after the first signal. This
module imports little: signals may come before the rest is there.
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
"""Seconds after the first signal before the process ends whatever it is in."""
_SIGNALS = {int(getattr(signal, name)) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)}


class Interrupted(BaseException):
    """A signal asks for the end. Not a KeyboardInterrupt: libraries catch that, and exit with codes of their
    own."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    @property
    def exit_code(self) -> int:
        """As shells have it: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + self.number

    def __str__(self) -> str:
        return (
            "interrupted" if self.number == signal.SIGINT else f"ended by {signal.Signals(self.number).name}"
        )


class _Command:
    """What the main thread and the one that watches signals share."""

    def __init__(self) -> None:
        self.active = self.raised = self.over = False
        self.outcome = "nothing was written"
        self.closing: list[Callable[[], object]] = []
        self._ending = threading.Lock()
        self._former_hook: Any = sys.unraisablehook
        self._source: socket.socket | None = None
        self._sink: socket.socket | None = None

    def listen(self) -> None:
        """Take the signals that the process does not ignore, as a job in the background does Ctrl-C."""
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
    """Say what a signal from now on ends the process with: what has been written, say."""
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
    """The process is one command: a signal ends the block and the process, and nothing temporary stays
    behind.

    For the main thread. Within another such block this one does nothing. Handlers are not put back: after the
    block a signal ends the process at once.
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
