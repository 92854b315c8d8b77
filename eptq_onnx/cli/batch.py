"""The command ``batch``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live

from eptq_onnx import jobs as batch_jobs
from eptq_onnx import workers as backends
from eptq_onnx.cli.app import QUANTIZE, app, one_sentence
from eptq_onnx.cli.manner import Manner, with_manner
from eptq_onnx.endings import Ended, fronts
from eptq_onnx.files import check_writable, write_atomically
from eptq_onnx.interrupts import tell_outcome
from eptq_onnx.report import files
from eptq_onnx.report.batch import in_words, line_of, sheet_of
from eptq_onnx.report.console import console, line, shown
from eptq_onnx.report.sheet import for_console


def _names() -> str:
    return "; ".join(f"{name} ({backend.about})" for name, backend in backends.registered().items())


@app.command(rich_help_panel=QUANTIZE, short_help="Quantize lists of models and sweeps over options.")
@with_manner("json", "quiet")
def batch(
    *,
    jobs: Annotated[Path, typer.Argument(help="File with the jobs (.toml).", show_default=False)],
    workers: Annotated[str, typer.Option(help=f"Where jobs run: {_names()}.")] = backends.DEFAULT,
    page: Annotated[
        Path | None,
        typer.Option(help="Where to write the page; by default index.html beside the results."),
    ] = None,
    manner: Manner,
) -> None:
    """Quantize all models that JOBS lists, or one with all combinations of options, and compare the results.

    The same command goes on after an interruption: what has ended is not done again, unless something has
    changed. The exit code is 1 if a job failed; the others are done all the same.
    """
    messages = console(stderr=True)
    with one_sentence(messages):
        listed = batch_jobs.read(jobs)
        page = Path(listed[0].folder) / "index.html" if page is None else page
        files.check(page)
        tell_outcome(f"the jobs that have ended are kept; the same command goes on from {shown(page.parent)}")
        silent = manner.quiet or manner.json
        ended: list[Ended] = []
        with _shown(messages, ended, len(listed), silent=silent) as show:
            for one in batch_jobs.run(listed, workers):
                ended.append(one)
                show()
        check_writable(page)
        write_atomically(page, files.batch_page(jobs.stem, ended).encode())
        found = fronts(ended)
        if manner.json:
            print(json.dumps({"page": str(page), "jobs": [asdict(e) for e in found]}, indent=2, default=str))
        elif manner.quiet:
            console().print(line(f"{page}: {in_words(found)}"), soft_wrap=True)
        else:
            out = console()
            out.print(for_console(sheet_of(found)))
            out.print(line(f"{in_words(found)}; wrote {page}"), soft_wrap=True)
            for e in found:
                if e.error:
                    out.print(line(f"{e.name} failed: {e.error}", "red"), soft_wrap=True)
    if any(e.error for e in ended):
        sys.exit(1)


class _Table:
    """A table that fills on a terminal, or a line a job elsewhere."""

    def __init__(self, messages: Console, ended: list[Ended], count: int, live: Live | None) -> None:
        self._messages, self._ended, self._count, self._live = messages, ended, count, live

    def __call__(self) -> None:
        if self._live is not None:
            self._live.update(for_console(sheet_of(fronts(self._ended))))
        else:
            text = line_of(self._ended[-1], len(self._ended), self._count)
            self._messages.print(line(text), soft_wrap=True)


@contextmanager
def _shown(
    messages: Console, ended: list[Ended], count: int, *, silent: bool
) -> Iterator[Callable[[], None]]:
    if silent:
        yield lambda: None
    elif messages.is_terminal:
        with Live(console=messages, transient=True) as live:
            yield _Table(messages, ended, count, live)
    else:
        yield _Table(messages, ended, count, None)
