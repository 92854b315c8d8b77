"""Console output: on any terminal or none, in any encoding, whatever names contain."""

from __future__ import annotations

import codecs
import io
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any, Protocol, cast

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from eptq_onnx.data.origin import Origin
from eptq_onnx.errors import OutputError
from eptq_onnx.estimates import Estimate
from eptq_onnx.interrupts import closing
from eptq_onnx.report.progress import Remaining

_REPLACE = "eptq-onnx.replace"
_SUBSTITUTES = {"→": "->", "×": "x", "…": "...", "–": "-", "µ": "u", "≥": ">=", "≤": "<="}
_ANSWER_SECONDS = 10.0
"""Time between two lines about a long step, without a terminal."""
_WORTH_TELLING = 1.0
"""Duration of a step below which no line reports its end, without a terminal."""
_MOST = 2000
"""Characters of a name or message that are shown."""


def shown(text: object, most: int = _MOST) -> str:
    """Return a text for one line of a console.

    Control, format and surrogate characters are escaped, and very long texts are shortened in the middle.
    """
    result = "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode("ascii")
        for c in str(text)[: 2 * most]
    )
    if len(result) <= most:
        return result
    return f"{result[: most // 2]} … {result[-most // 4 :]}"


class _Stream:
    """A text stream that survives any text, and a reader that has gone away.

    Parameters
    ----------
    stream : text stream
    name : str
        Name for error messages; if empty, errors of the device are ignored as well.
    """

    def __init__(self, stream: IO[str], name: str = "") -> None:
        self._stream, self._name, self._gone = stream, name, False

    @property
    def encoding(self) -> str:
        return getattr(self._stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        if not self._gone:
            self._try(lambda: self._stream.write(text.encode(self.encoding, _REPLACE).decode(self.encoding)))
        return len(text)

    def flush(self) -> None:
        if not self._gone:
            self._try(self._stream.flush)

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    def _try(self, act: Callable[[], object]) -> None:
        try:
            act()
        except OSError as e:
            self._gone = True
            with suppress(OSError, ValueError):  # buffered text would fail again at exit
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            if self._name and not isinstance(e, BrokenPipeError):
                raise OutputError(f"{self._name} cannot be written: {e.strerror or e}.") from e


def _replaced(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    substitutes = (_SUBSTITUTES.get(c, "?") for c in error.object[error.start : error.end])
    return "".join(s if s.isascii() else "?" for s in substitutes), error.end


codecs.register_error(_REPLACE, _replaced)


def tolerant_streams() -> None:
    """Make stdout and stderr replace characters that they cannot encode, and open closed streams."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # the next opened file would get this number and receive the messages
            os.open(os.devnull, os.O_RDWR)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_REPLACE)


def console(*, stderr: bool = False) -> Console:
    """Return a console on stdout or stderr."""
    stream = sys.stderr if stderr else sys.stdout
    if stream is None:
        return Console(file=io.StringIO())
    return _Whole(file=cast(IO[str], _Stream(stream, "" if stderr else "standard output")))


class _Whole(Console):
    """A console that cuts no line: the terminal breaks what is too long, and it can still be copied."""

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*objects, **{"crop": False, **options})


def line(text: object, style: str = "", *, most: int = _MOST) -> Text:
    """Return a text without markup, emoji codes, or anything that a terminal would obey."""
    return Text(shown(text, most), style=style)


class Display(Protocol):
    """Progress display; see `eptq_onnx.passes.base.Progress`."""

    def __call__(self, step: str, done: int, total: int, detail: object = "") -> None:
        """Report progress."""
        ...


def duration(seconds: float) -> str:
    """Return a duration in words, rounded."""
    if seconds < 10:
        return "less than 10 seconds"
    if seconds < 60:
        return f"about {max(10, round(seconds / 5) * 5)} seconds"
    minutes, rest = divmod(round(seconds / 10) * 10, 60)
    if minutes < 10:
        return f"about {minutes} min {rest} s" if rest else f"about {minutes} min"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"about {hours} h {minutes} min" if hours else f"about {minutes} min"


class _Table(Progress):
    """A bar for each step, and the remaining time of the run below them."""

    def __init__(self, console: Console, remaining: Remaining) -> None:
        self.remaining, self._screen, self.over = remaining, console, False
        columns = (
            TextColumn("{task.description:<11}", markup=False),
            BarColumn(bar_width=30, style="bright_black", complete_style="green", finished_style="green"),
            TextColumn("{task.percentage:>3.0f}%", markup=False),
            TextColumn("{task.fields[detail]}", markup=False),
        )
        super().__init__(*columns, console=console)

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks[-max(1, self._screen.height - 2) :])
        left = self.remaining.seconds()
        if self.over:
            yield Text(f"{self.remaining.elapsed:.0f} s")
        elif left is not None:
            yield Text(f"{duration(left)} left")


class _Bars:
    """Display for a terminal: a bar for each step once it begins."""

    def __init__(self, table: _Table, preset: str) -> None:
        self._table, self._preset = table, preset
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, step: str, done: int, total: int, detail: object = "") -> None:
        self._table.start()  # not earlier, so that an error in the first check appears without bars
        if isinstance(detail, Estimate):
            self._table.remaining.expect(detail.shares)
            self._table.console.print(line(f"preset {self._preset}: {detail}"))
        if isinstance(detail, Origin):
            self._table.console.print(line(f"data: {detail}"), soft_wrap=True)
        self._table.remaining.update(step, done, total)
        if isinstance(detail, (Estimate, Origin)):
            return
        if step not in self._tasks:
            self._tasks[step] = self._table.add_task(step, total=total, detail="")
        self._table.update(self._tasks[step], completed=done, total=total, detail=shown(detail, 20))


class _Lines:
    """Display without a terminal: a line when a step begins and ends, and occasionally in between."""

    def __init__(self, console: Console, preset: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._preset, self._clock = console, preset, clock
        self._remaining = Remaining(clock)
        self._step, self._open = "", False
        self._began = self._told = clock()

    def __call__(self, step: str, done: int, total: int, detail: object = "") -> None:
        if isinstance(detail, Estimate):
            self._remaining.expect(detail.shares)
            self._write(f"preset {self._preset}: {detail}")
        self._remaining.update(step, done, total)
        if isinstance(detail, Estimate):
            return
        now = self._clock()
        if step != self._step:
            self._end(now)
            self._step, self._open, self._began, self._told = step, True, now, now
            self._write(f"{step}: {shown(detail)}" if done >= total and detail else step)
        if done >= total:
            self._end(now)
        elif now - self._told >= _ANSWER_SECONDS:
            self._told = now
            left = self._remaining.seconds()
            parts = (f"{done} of {total}", shown(detail), "" if left is None else f"{duration(left)} left")
            self._write(f"{step}: {', '.join(filter(None, parts))}")

    def _end(self, now: float) -> None:
        if self._open and now - self._began >= _WORTH_TELLING:
            self._write(f"{self._step}: {now - self._began:.0f} s")
        self._open = False

    def _write(self, text: str) -> None:
        self._console.file.write(f"{shown(text)}\n")
        self._console.file.flush()


@contextmanager
def display(console: Console, preset: str) -> Iterator[Display]:
    """Show the progress of a run: bars on a terminal that can move its cursor, else plain lines.

    Parameters
    ----------
    console : Console
    preset : str
        Name of the preset, shown with the estimate.
    """
    if not _has_cursor(console):
        yield _Lines(console, preset)
        return
    table = _Table(console, Remaining())
    try:
        with closing(console.show_cursor):
            yield _Bars(table, preset)
    finally:
        table.over = True
        if table.live.is_started:
            table.stop()


def _has_cursor(console: Console) -> bool:
    """Return True for a terminal that can move its cursor.

    Colours may be forced into a pipe, which has no cursor; the log of a CI service has none either.
    """
    if os.environ.get("CI", "").lower() not in ("", "0", "false"):
        return False
    return console.file.isatty() and console.is_terminal and not console.is_dumb_terminal
