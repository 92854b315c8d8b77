"""How a command prints: options that commands have in common."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import typer

F = TypeVar("F", bound=Callable[..., None])


@dataclass(frozen=True)
class Manner:
    """How a command prints.

    Parameters
    ----------
    json : bool
        One JSON document on standard output, and nothing else there.
    quiet : bool
        The result in one line, and no progress.
    verbose : bool
        Everything.
    """

    json: bool = False
    quiet: bool = False
    verbose: bool = False


_OPTIONS = {
    "json": Annotated[bool, typer.Option("--json", help="Print everything as JSON, and nothing else.")],
    "quiet": Annotated[bool, typer.Option("--quiet", "-q", help="Print the result alone, in one line.")],
    "verbose": Annotated[bool, typer.Option("--verbose", "-v", help="Print all there is to say.")],
}


def with_manner(*names: str) -> Callable[[F], F]:
    """Give a command, in place of its parameter ``manner``, the options of these names."""

    def decorate(command: F) -> F:
        signature = inspect.signature(command, eval_str=True)
        added = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=_OPTIONS[name])
            for name in names
        ]

        def called(**given: Any) -> None:
            manner = Manner(**{name: given.pop(name) for name in names})
            command(**given, manner=manner)

        own = [p for p in signature.parameters.values() if p.name != "manner"]
        last = [p for p in own if p.kind is p.VAR_KEYWORD]
        kept = [*(p for p in own if p not in last), *added, *last]
        called.__doc__, called.__name__ = command.__doc__, command.__name__
        called.__signature__ = inspect.Signature(kept)  # type: ignore[attr-defined]
        called.__annotations__ = {p.name: p.annotation for p in kept}
        return called  # type: ignore[return-value]

    return decorate
