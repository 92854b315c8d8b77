"""The command ``lint``."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from eptq_onnx.api import lint as run
from eptq_onnx.cli.app import CHECK, app, one_sentence
from eptq_onnx.cli.manner import Manner, with_manner
from eptq_onnx.cli.options import TARGET, TargetName
from eptq_onnx.report.console import console, line
from eptq_onnx.rules import Finding, Lint, Severity

_SHOWN = 5
"""Maximum number of findings printed per rule."""
_STYLES = {Severity.ERROR: "bold red", Severity.WARNING: "yellow"}


@app.command(rich_help_panel=CHECK, short_help="Check a file against the rules of a target.")
@with_manner("json", "quiet", "verbose")
def lint(
    *,
    model: Annotated[Path, typer.Argument(help="The Q/DQ model, from any tool.", show_default=False)],
    target: TargetName = TARGET,
    strict: Annotated[bool, typer.Option(help="Exit with 1 for warnings, too.")] = False,
    manner: Manner,
) -> None:
    """Check MODEL against the rules of a target. The exit code is 1 if there are errors.

    An error means that the target rejects the model or computes something else; a warning costs time or
    accuracy.
    """
    with one_sentence(console(stderr=True)):
        found = run(model, target)
        if manner.json:
            print(json.dumps({**asdict(found), "counts": found.counts}, indent=2))
        else:
            show_findings(found, model, console(), manner)
    counts = found.counts
    if counts[Severity.ERROR.value] or (strict and counts[Severity.WARNING.value]):
        raise typer.Exit(1)


def _varied(findings: list[Finding]) -> list[Finding]:
    """Return findings in an order that starts with one of each kind of message."""
    kinds: dict[str, int] = {}
    places = []
    for finding in findings:
        kind = re.sub(r"\d+", "", finding.message)
        kinds[kind] = kinds.get(kind, 0) + 1
        places.append(kinds[kind])
    return [finding for _, finding in sorted(zip(places, findings, strict=True), key=lambda item: item[0])]


def show_findings(found: Lint, model: Path, out: Console, manner: Manner) -> None:
    """Print the findings by rule, and their number, in a quiet manner alone."""
    most = len(found.findings) if manner.verbose else _SHOWN
    for rule, group in groupby(() if manner.quiet else found.findings, key=lambda f: f.rule):
        findings = list(group)
        severity = findings[0].severity
        out.print(line(f"{severity.value} {rule}: {findings[0].remedy}", _STYLES[severity]), soft_wrap=True)
        for finding in _varied(findings)[:most]:
            where = f" ({finding.where})" if finding.where else ""
            out.print(line(f"  {finding.node}{where}: {finding.message}"), soft_wrap=True)
        if len(findings) > most:
            out.print(line(f"  and {len(findings) - most} more; --verbose lists all"), soft_wrap=True)
    counts = " and ".join(f"{count} {name}{'s' * (count != 1)}" for name, count in found.counts.items())
    out.print(line(f"{model} for {found.target}: {counts}"), soft_wrap=True)
