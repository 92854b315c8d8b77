"""Options and a state that record what is read of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import PrivateAttr
from pydantic_core import to_jsonable_python

from eptq_onnx.config import Config
from eptq_onnx.passes.base import Context, State
from eptq_onnx.workdir import Partial

FIELDS = tuple(f.name for f in dataclasses.fields(State) if f.name != "notes")
"""Fields of a state except notes, which are only appended to."""
_READS = "_reads"
_PROPERTIES = {name for name, value in vars(Config).items() if isinstance(value, property)}
"""Properties of `Config`."""


class Reads:
    """Record what a pass reads of its context and state.

    Parameters
    ----------
    ctx : Context
    state : State
    """

    def __init__(self, ctx: Context, state: State) -> None:
        self.ctx, self._fields = ctx, set[str]()
        self._config, self._given = _WatchedConfig.of(ctx.config), _WatchedConfig.of(ctx.given)
        self.state: State = object.__new__(_WatchedState)
        vars(self.state).update({**vars(state), _READS: self._fields})

    def context(self, partial: Partial) -> Context:
        """Return the context with watched options.

        Cached values are recomputed, so that their reads are seen.
        """
        return dataclasses.replace(self.ctx, config=self._config, given=self._given, partial=partial)

    def told(self, digests: Mapping[str, str]) -> dict[str, Any]:
        """Return what was read so far as JSON: options with values, fields with digests."""
        return {
            "config": options(self.ctx.config, self._config.read),
            "given": options(self.ctx.given, self._given.read),
            "fields": {name: digests[name] for name in sorted(self._fields)},
        }


def options(config: Config, names: Iterable[str]) -> dict[str, Any]:
    """Return some options, and properties derived from options, with their values, as JSON."""
    return {name: to_jsonable_python(getattr(config, name)) for name in sorted(names)}


class _WatchedConfig(Config):
    _read: set[str] = PrivateAttr(default_factory=set)
    _plain: Config = PrivateAttr()

    @classmethod
    def of(cls, config: Config) -> _WatchedConfig:
        """Return a watched copy."""
        watched = cls.model_construct(**dict(config))
        watched._plain = config
        return watched

    @property
    def read(self) -> set[str]:
        """Names of what was read."""
        return self._read

    def __getattribute__(self, name: str) -> Any:
        if name in Config.model_fields:
            self._read.add(name)
        elif name in _PROPERTIES:
            # What counts is its value: others that it may follow from are as good.
            self._read.add(name)
            return getattr(self._plain, name)
        return super().__getattribute__(name)

    # These do not pass through __getattribute__.
    def __iter__(self) -> Any:
        self._read.update(Config.model_fields)
        return super().__iter__()

    def __eq__(self, other: object) -> bool:
        self._read.update(Config.model_fields)
        return super().__eq__(other)

    __hash__ = None  # type: ignore[assignment]

    def model_dump_json(self, **how: Any) -> str:
        self._read.update(Config.model_fields)
        return super().model_dump_json(**how)

    def model_dump(self, **how: Any) -> dict[str, Any]:
        self._read.update(how.get("include") or Config.model_fields)
        return super().model_dump(**how)

    def model_copy(self, **how: Any) -> _WatchedConfig:
        self._read.update(Config.model_fields)
        return super().model_copy(**how)


class _WatchedState(State):
    def __getattribute__(self, name: str) -> Any:
        if name in FIELDS:
            object.__getattribute__(self, "__dict__").get(_READS, set()).add(name)
        return object.__getattribute__(self, name)
