"""Keep results of passes in a workdir, and reuse them as long as everything they depend on is the same.

Dependencies are observed, not declared: a pass receives options and a state that record what it reads. A
result is therefore never reused if anything it depends on has changed, and a changed option reruns only the
passes that read it, and those whose inputs come out differently.
"""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from eptq_onnx._version import __version__
from eptq_onnx.passes.base import Context, Pass, State
from eptq_onnx.watched import FIELDS, Reads, options
from eptq_onnx.workdir import HashOnly, Partial, Workdir, decode, encode

Work = Callable[[Pass, State, Context], State]
"""Runs a pass."""
_DISTRIBUTIONS = ("numpy", "onnx", "onnx-graphsurgeon", "onnxruntime", "onnxruntime-training-cpu", "scipy")
"""Distributions whose versions results may depend on."""
_SHARE_OF_TIME = 0.1
"""Fraction of a long pass's time that saving its progress may take."""


class Resume:
    """Results of one run in a workdir.

    Parameters
    ----------
    workdir : Workdir
    state : State
        Before the first pass.
    ctx : Context
    """

    def __init__(self, workdir: Workdir, state: State, ctx: Context) -> None:
        self._workdir, self._folder = workdir, ctx.folder
        self._base = _base_of(ctx)
        self._digests = {name: encode(getattr(state, name), HashOnly()) for name in FIELDS}
        self.taken: list[str] = []
        """What this run took from the workdir."""
        self._absent: set[str] = set()
        """Fields whose values are only in the workdir."""

    def known(self, passes: Sequence[Pass], ctx: Context) -> set[str]:
        """Return the names of the first passes whose results the workdir has."""
        digests, found = dict(self._digests), set()
        for step in passes:
            entry = self._find(step, ctx, digests)
            if entry is None:
                break
            digests.update(entry["provides"])
            found.add(step.name)
        return found

    def take(self, step: Pass, state: State, ctx: Context) -> State | None:
        """Return the state after a pass whose result the workdir has; None if the pass must run."""
        entry = self._find(step, ctx, self._digests)
        if entry is None:
            return None
        self._digests.update(entry["provides"])
        self._absent |= set(entry["provides"])
        self.taken.append(step.name)
        return state.noting(*entry["notes"])

    def loaded(self, state: State) -> State:
        """Load all values that are only in the workdir."""
        values = {
            name: decode(self._digests[name], self._workdir, self._folder)
            for name in FIELDS
            if name in self._absent
        }
        self._absent = set()
        return state.changed(**values)

    def run(self, step: Pass, state: State, ctx: Context, work: Work) -> State:
        """Run a pass, and keep what it provides.

        Parameters
        ----------
        step : Pass
        state : State
        ctx : Context
        work : callable
            Runs the pass on the watched state and context.
        """
        state = self.loaded(state)
        reads = Reads(ctx, state)
        partial = _KeptPartial(self._workdir, f"{step.name} (partial)", self._base, reads, self._digests)
        after = work(step, reads.state, reads.context(partial))
        made = {name: vars(after)[name] for name in FIELDS if vars(after)[name] is not vars(state)[name]}
        undeclared = made.keys() - set(step.provides)
        if undeclared:
            raise RuntimeError(
                f"the pass {step.name} provides {', '.join(sorted(undeclared))} without saying so"
            )
        told = reads.told(self._digests)
        provides = {
            name: encode(value, HashOnly() if step.repeats else self._workdir) for name, value in made.items()
        }
        self._digests.update(provides)
        if not step.repeats:
            notes = list(after.notes[len(state.notes) :])
            kept = {"provides": provides, "notes": notes, "values": sorted(set(provides.values()))}
            self._workdir.add(step.name, {"base": self._base, **told, **kept})
            partial.forget()
        if partial.start:
            self.taken.append(f"{step.name} (its first {partial.start} steps)")
        return state.changed(**made, notes=after.notes)

    def _find(self, step: Pass, ctx: Context, digests: Mapping[str, str]) -> dict[str, Any] | None:
        if step.repeats:
            return None
        return next(_applying(self._workdir.entries(step.name), self._base, ctx, digests), None)


class _KeptPartial(Partial):
    """Unfinished work of a pass, kept with what the pass has read so far."""

    def __init__(
        self, workdir: Workdir, name: str, base: str, reads: Reads, digests: Mapping[str, str]
    ) -> None:
        self._workdir, self._name, self._base = workdir, name, base
        self._reads, self._digests = reads, dict(digests)
        self._last: dict[str, Any] | None = None
        self._due = 0.0
        self.start = 0
        """Progress that an earlier run had saved."""

    def load(self) -> Any:
        found = _applying(self._workdir.entries(self._name), self._base, self._reads.ctx, self._digests)
        self._last = max(found, key=lambda entry: entry["progress"], default=None)
        if self._last is None:
            return None
        self.start = self._last["progress"]
        return decode(self._last["values"][0], self._workdir)

    def save(self, progress: int, value: dict[str, Any]) -> None:
        began = time.perf_counter()
        if began < self._due:
            return
        former, values = self._last, [encode(value, self._workdir)]
        self._last = {
            "base": self._base,
            **self._reads.told(self._digests),
            "progress": progress,
            "values": values,
        }
        self._workdir.add(self._name, self._last)
        if former is not None:
            self._workdir.remove(self._name, former)
        ended = time.perf_counter()
        self._due = ended + (ended - began) / _SHARE_OF_TIME

    def forget(self) -> None:
        """Remove the unfinished work, because the pass is done."""
        if self._last is not None:
            self._workdir.remove(self._name, self._last)


def _applying(
    entries: Iterable[dict[str, Any]], base: str, ctx: Context, digests: Mapping[str, str]
) -> Iterator[dict[str, Any]]:
    """Yield the entries of which everything that they depend on is unchanged."""
    for entry in entries:
        if (
            entry["base"] == base
            and all(digests.get(name) == digest for name, digest in entry["fields"].items())
            and entry["config"] == options(ctx.config, entry["config"])
            and entry["given"] == options(ctx.given, entry["given"])
        ):
            yield entry


def _base_of(ctx: Context) -> str:
    """Digest what a pass may read beside options and state.

    That is: samples, target, engine, libraries and the code itself.
    """
    libraries = [HashOnly().put_file(str(path)) for path in ctx.given.custom_ops]
    values = (
        _code(), _versions(), libraries, ctx.target.model_dump(), ctx.engine and ctx.engine.name,
        ctx.samples.identity, ctx.shares, ctx.found, ctx.multiplications, ctx.float_bytes,
        *([ctx.config.device] if ctx.config.device != "cpu" else []),
    )  # fmt: skip
    return encode(values, HashOnly())


@cache
def _code() -> str:
    """Digest the source of the package, because a version may be under development."""
    folder, state = Path(__file__).parent, hashlib.blake2b()
    for path in sorted([*folder.rglob("*.py"), *folder.rglob("*.toml")]):
        state.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return state.hexdigest()


def _versions() -> dict[str, str]:
    found = {name: version for name in _DISTRIBUTIONS if (version := _version(name)) is not None}
    return {
        **found,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "eptq-onnx": __version__,
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
