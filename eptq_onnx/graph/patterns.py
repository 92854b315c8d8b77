"""Patterns that select nodes of a graph, for options that apply to some nodes only."""

from __future__ import annotations

import difflib
import re

from eptq_onnx.errors import ConfigError
from eptq_onnx.graph.view import GraphView

_PATH = re.compile(r"from:(.+)\.\.to:(.+)")
_TENSOR = "tensor:"
_PREFIXES = ("re:", "op:", "from:", _TENSOR)


def exactly(name: str) -> str:
    """Return the pattern that matches the node of a name and no other."""
    return f"re:{re.escape(name)}" if name.startswith(_PREFIXES) else name


def of_tensor(name: str) -> str:
    """Return the pattern of a tensor; see `tensor_of`."""
    return f"{_TENSOR}{name}"


def tensor_of(view: GraphView, pattern: str) -> str | None:
    """Return the tensor that a pattern ``tensor:NAME`` means; None for patterns of nodes.

    Raises
    ------
    ConfigError
        If there is no such tensor.
    """
    if not pattern.startswith(_TENSOR):
        return None
    name = pattern.removeprefix(_TENSOR)
    known = [*view.inputs, *(o for n in view.nodes for o in n.output if o)]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"; similar names: {', '.join(near)}" if near else ""
        raise ConfigError(f"there is no tensor {name!r} in the normalized network{hint}.")
    return name


def matching(view: GraphView, pattern: str) -> frozenset[str]:
    """Return the names of the nodes that match a pattern.

    Parameters
    ----------
    view : GraphView
    pattern : str
        ``NAME``, a node's name; ``re:REGEX``, which matches whole names; ``op:TYPE``, an operator;
        ``from:A..to:B``, the nodes on all paths from node A to node B, both included.

    Raises
    ------
    ConfigError
        If no node matches, or the pattern is malformed.
    """
    path = _PATH.fullmatch(pattern)
    if path is not None:
        found = _between(view, path[1], path[2])
    elif pattern.startswith("re:"):
        try:
            expression = re.compile(pattern.removeprefix("re:"))
        except re.error as e:
            raise ConfigError(f"the pattern {pattern!r} is not a regular expression: {e}.") from e
        found = {n.name for n in view.nodes if expression.fullmatch(n.name)}
    elif pattern.startswith("op:"):
        found = {n.name for n in view.nodes if n.op_type == pattern.removeprefix("op:")}
    else:
        found = {_named(view, pattern)}
    if not found:
        there = (
            f"; operators are {', '.join(sorted({n.op_type for n in view.nodes}))}"
            if pattern.startswith("op:")
            else ""
        )
        raise ConfigError(f"the pattern {pattern!r} matches no node{there}.")
    return frozenset(found)


def _named(view: GraphView, name: str) -> str:
    names = [n.name for n in view.nodes]
    if name in names:
        return name
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"; similar names: {', '.join(near)}" if near else ""
    raise ConfigError(
        f"there is no node {name!r} (a node that is folded into a layer, such as a batch normalization, "
        f"no longer exists){hint}."
    )


def _between(view: GraphView, first: str, last: str) -> set[str]:
    nodes = {n.name: n for n in view.nodes}
    begin, end = nodes[_named(view, first)], nodes[_named(view, last)]
    if begin is end:
        return {first}
    behind, before = view.downstream(o for o in begin.output if o), view.upstream(i for i in end.input if i)
    inside = {n.name for n in view.nodes if any(o in behind and o in before for o in n.output)}
    if first not in inside:
        raise ConfigError(
            f"the pattern 'from:{first}..to:{last}' matches no node: no path leads from one to the other."
        )
    return {*inside, last}
