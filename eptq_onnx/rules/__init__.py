"""Check a Q/DQ file, from this or any other tool, against the rules of a target.

Most rules are derived from the target file: its types, zero points, scales, biases and integer operators.
Each finding names a node, the rule that it breaks and a remedy.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from onnx import ModelProto

from eptq_onnx.rules.numbers import NUMBERS
from eptq_onnx.rules.places import PLACES
from eptq_onnx.rules.rule import Rule, Severity
from eptq_onnx.rules.scopes import flat
from eptq_onnx.rules.view import QdqView
from eptq_onnx.targets import Target

RULES: tuple[Rule, ...] = (*NUMBERS, *PLACES)
"""All rules, in the order in which findings are reported."""


@dataclass(frozen=True)
class Finding:
    """A place where a file breaks a rule.

    Parameters
    ----------
    rule : str
    severity : Severity
    node : str
        Name of the node, or of its first output if it has no name.
    message : str
        What is wrong with the node, as a sentence without a full stop.
    remedy : str
    where : str
        The body of an If, Loop or Scan, or the function, that the node is in; empty for the main graph.
    """

    rule: str
    severity: Severity
    node: str
    message: str
    remedy: str
    where: str = ""


@dataclass(frozen=True)
class Lint:
    """The result of checking one file.

    Parameters
    ----------
    target : str
        Name of the target.
    pairs : int
        Number of DequantizeLinear nodes, in bodies and functions, too.
    findings : tuple of Finding
    """

    target: str
    pairs: int
    findings: tuple[Finding, ...]

    @property
    def counts(self) -> dict[str, int]:
        """Return the number of findings of each severity."""
        found = Counter(f.severity.value for f in self.findings)
        return {severity.value: found[severity.value] for severity in Severity}


def lint(model: ModelProto, target: Target) -> Lint:
    """Check a model against the rules of a target.

    Parameters
    ----------
    model : ModelProto
    target : Target

    Returns
    -------
    Lint
        It has no findings if the file follows every rule.
    """
    laid = flat(model)
    view = QdqView(laid.model)
    findings = tuple(
        Finding(rule.name, rule.severity, place.node, message, rule.remedy, place.where)
        for rule in RULES
        for node, message in rule.check(view, target)
        for place in (laid.places[node],)
    )
    return Lint(target.name, len(view.dequantizers), findings)


__all__ = ["RULES", "Finding", "Lint", "Rule", "Severity", "lint"]
