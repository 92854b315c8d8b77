"""The record of a rule, and the decorator that makes one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum

from eptq_onnx.rules.view import QdqView
from eptq_onnx.targets import Target

Check = Callable[[QdqView, Target], Iterator[tuple[str, str]]]
"""Yields the name of each node that breaks the rule, and why as a sentence without a full stop."""


class Severity(str, Enum):
    """What happens if a rule is broken."""

    ERROR = "error"
    """The runtime rejects the file or computes something else."""
    WARNING = "warning"
    """The runtime computes more slowly, or less accurately, than it could."""


@dataclass(frozen=True)
class Rule:
    """A rule for Q/DQ files.

    Parameters
    ----------
    name : str
    severity : Severity
    about : str
        What must hold, as a sentence.
    remedy : str
        How to fix a file that breaks it, as a sentence.
    check : callable
        Function of (view, target) that yields the violations; none if the rule does not apply to the target.
    """

    name: str
    severity: Severity
    about: str
    remedy: str
    check: Check


def rule(name: str, severity: Severity, about: str, remedy: str) -> Callable[[Check], Rule]:
    """Return a decorator that turns a check into a rule."""
    return lambda check: Rule(name, severity, about, remedy, check)
