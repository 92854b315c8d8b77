"""What a rule is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum

from eptq_onnx.rules.view import QdqView
from eptq_onnx.targets import Target

Check = Callable[[QdqView, Target], Iterator[tuple[str, str]]]
"""Yields the node and what is wrong there, as a sentence without a full stop."""


class Severity(str, Enum):
    """What follows if a rule is broken."""

    ERROR = "error"
    """The runtime refuses the file or computes something else."""
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
        What to do otherwise, as a sentence.
    check : callable
        (view, target) to the places where it does not hold. A rule that does not concern the target finds
        none.
    """

    name: str
    severity: Severity
    about: str
    remedy: str
    check: Check


def rule(name: str, severity: Severity, about: str, remedy: str) -> Callable[[Check], Rule]:
    """Make a rule of a function."""
    return lambda check: Rule(name, severity, about, remedy, check)
