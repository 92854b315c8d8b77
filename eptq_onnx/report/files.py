"""Reports as files: the suffix says which form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from eptq_onnx.endings import Ended
from eptq_onnx.errors import InstallError, OutputError
from eptq_onnx.files import write_atomically

if TYPE_CHECKING:
    from eptq_onnx.report import Report

_NEEDED = ("jinja2", "matplotlib")
"""What a page is made with."""


def page(report: Report) -> str:
    """Return a report as one HTML page.

    Raises
    ------
    InstallError
        If the extra ``report`` is not installed.
    """
    _check_installed("this report")
    return str(import_module("eptq_onnx.report.page").page_of(report))


def batch_page(title: str, ended: Sequence[Ended]) -> str:
    """Return the page of a batch; see `page`."""
    _check_installed("this page")
    return str(import_module("eptq_onnx.report.page.batch").batch_page(title, ended))


def markdown(report: Report) -> str:
    """Return a report as Markdown."""
    return str(import_module("eptq_onnx.report.markdown").markdown_of(report))


def _json(report: Report) -> str:
    return report.to_json()


_FORMS: dict[str, Callable[[Report], str]] = {".html": page, ".md": markdown, ".json": _json}
"""Suffix to what makes the file."""
SUFFIXES = tuple(_FORMS)


def check(path: Path) -> None:
    """Check, before any work, that a report can be made as the name of its file asks.

    Raises
    ------
    OutputError
        If the suffix is unknown.
    InstallError
        If what a page is made with is not installed.
    """
    if _suffix(path) == ".html":
        _check_installed(str(path))


def content(report: Report, path: Path) -> bytes:
    """Return what is written to a file of this name."""
    return _FORMS[_suffix(path)](report).encode()


def save(report: Report, path: Path) -> None:
    """Write a report; see `eptq_onnx.report.Report.save`."""
    check(path)
    write_atomically(path, content(report, path))


def _suffix(path: Path) -> str:
    found = path.suffix.lower()
    if found not in _FORMS:
        *others, last = SUFFIXES
        raise OutputError(
            f"the report {path} cannot be written: give a name that ends in {', '.join(others)} or {last}."
        )
    return found


def _check_installed(what: str) -> None:
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise InstallError(
            f"{what} is not written: a page needs {' and '.join(missing)}. Install them with "
            'pip install "eptq-onnx[report]", or write the report as .md or .json.'
        )
