"""Keep a score of the user's own: spare what does most to the outputs until the written file keeps it.

The file as asked for is made and scored first. If it misses the limit, its parts are ranked (`ranking`), and
files in which more and more of them are spared are tried (`eptq_onnx.method.ladder`). They share all that was
done up to the plan: samples, rotation, scores and ranges; weights are rounded anew for each, layer by layer,
and the network-wise optimization runs for the one that is written.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from eptq_onnx import runtimes, scratch
from eptq_onnx.config import Accuracy
from eptq_onnx.errors import ConfigError, InstallError, ModelError
from eptq_onnx.graph import io
from eptq_onnx.graph.branches import sink
from eptq_onnx.method.ladder import lowest
from eptq_onnx.method.plan import plan
from eptq_onnx.method.spare import Rules
from eptq_onnx.parallel import available_cores
from eptq_onnx.passes.base import UNSET, Context, State
from eptq_onnx.passes.plans import replanned
from eptq_onnx.pipeline import Runner
from eptq_onnx.prepare import final
from eptq_onnx.proto import store
from eptq_onnx.ranking import MOST_PASSES, Move, Ranking
from eptq_onnx.records import Rounding
from eptq_onnx.resume import Resume
from eptq_onnx.runtimes.base import Verifier
from eptq_onnx.scoring import evaluate_of, float_model, quantized_model, score_of
from eptq_onnx.start import Start, silent
from eptq_onnx.trail import Attempt, Trail
from eptq_onnx.workdir import HashOnly, Workdir, encode

_STEP = 0.03
"""Share of the noise that each candidate has less than the one before, at least."""


@dataclass(frozen=True)
class Kept:
    """The state after all passes of the file that is written, and how it was found.

    Parameters
    ----------
    state : State
    ctx : Context
    trail : Trail
    """

    state: State
    ctx: Context
    trail: Trail


@dataclass
class _Rung:
    """A candidate: what it spares, and its foreseen noise as a share of that of the file as asked for."""

    rules: Rules
    noise: float
    spared: int
    state: State = UNSET
    ctx: Context = UNSET
    place: int = 0


def controlled(begun: Start, ctx: Context, accuracy: Accuracy, workdir: Workdir | None = None) -> Kept:
    """Run all passes, with as many parts spared as the score needs.

    Parameters
    ----------
    begun : Start
        A runner, and the state before the first pass.
    ctx : Context
    accuracy : Accuracy
        With a function that scores.
    workdir : Workdir, optional
        Keeps what candidates take long to make.

    Raises
    ------
    EptqError
        If the function gives no score, or from a pass.
    """
    chooses = ctx.given.chooses_widths or ctx.given.activation_budget is not None
    if accuracy.max_drop is not None and chooses:
        raise ConfigError(
            "max_drop chooses widths by the score, and a budget by the noise: leave one of them out."
        )
    with scratch.folder() as folder:
        return _Search(begun, ctx, accuracy, Path(folder), workdir).run()


class _Search:
    """One search; see `controlled`."""

    def __init__(
        self, begun: Start, ctx: Context, accuracy: Accuracy, folder: Path, workdir: Workdir | None
    ) -> None:
        self._begun, self._ctx, self._accuracy = begun, ctx, accuracy
        self._folder, self._workdir = folder, workdir
        self._evaluate = evaluate_of(accuracy.evaluate or "")
        self._threads = min(ctx.config.threads or available_cores(), available_cores())
        self._attempts: list[Attempt] = []
        self._unavailable: dict[str, None] = {}
        self._computed_by = ""
        self._float = self._most = 0.0

    def run(self) -> Kept:
        """Score the float model and the file as asked for; search if that misses the limit."""
        accuracy, runner = self._accuracy, self._begun.runner
        self._tell(0)
        given = io.load(self._ctx.source, self._ctx.folder)
        self._float = score_of(self._evaluate, float_model(given, self._threads))
        self._most = np.inf if accuracy.max_drop is None else accuracy.max_drop.of(self._float)
        self._tell(1)
        began = time.perf_counter()
        head = runner.part(last="allocate").run(self._begun.state, self._ctx)
        whole = runner.part(first="ranges").run(head, self._ctx)
        self._score("as asked for", whole, None, began)
        if self._attempts[0].passed:
            return self._kept(whole, self._ctx, 0)
        with runner.timed("search"):
            rung = self._found(head, whole)
        return self._kept(whole, self._ctx, 0) if rung is None else self._finished(rung)

    def _found(self, head: State, whole: State) -> _Rung | None:
        """Return the rung to be written; None for the file as asked for."""
        rungs = self._ladder(whole)
        # One evaluation was for the float model, one for the file as asked for; one is for the optimized one.
        tries = max(1, self._accuracy.max_evaluations - 2 - self._ctx.config.optimizes)

        def drop_of(k: int) -> float:
            self._make(head, rungs[k])
            return self._attempts[-1].drop

        best, drops = lowest([r.noise for r in rungs], self._attempts[0].drop, self._most, drop_of, tries)
        if best is None:
            best = min(drops, key=lambda k: (drops[k], k))
        return rungs[best] if best else None

    def _ladder(self, whole: State) -> list[_Rung]:
        """Return the candidates, from the file as asked for to the one in which all but a layer is spared."""
        ctx = self._ctx
        ranking = Ranking(whole, ctx)
        moves, total = ranking.moves(MOST_PASSES * ctx.samples.count, ctx.multiplications)
        rungs, taken, noise = [_Rung(Rules(), 1.0, 0)], list[Move](), total
        for k, move in enumerate(moves):
            taken.append(move)
            noise -= move.gain
            share = max(noise / total, 0.0) if total > 0 else 0.0
            if share <= (1 - _STEP) * rungs[-1].noise or k == len(moves) - 1:
                spared = len({m.piece for m in taken})
                rungs.append(_Rung(ranking.rules(m.spare for m in taken), share, spared))
        while len(rungs) > 1 and not self._is_quantized(whole, rungs[-1]):
            rungs.pop()
        return rungs

    def _is_quantized(self, whole: State, rung: _Rung) -> bool:
        """Return True if a rung leaves anything to quantize."""
        config = rung.rules.added_to(self._ctx.config)
        try:
            plan(
                whole.model,
                self._ctx.target,
                config,
                whole.left_float,
                whole.float_nodes,
                whole.exact,
                whole.dynamic,
            )
        except ModelError:
            return False
        return True

    def _make(self, head: State, rung: _Rung) -> None:
        """Make the file of a rung from what all share, and score it."""
        began, ctx = time.perf_counter(), self._ctx
        given, config = rung.rules.added_to(ctx.given), rung.rules.added_to(ctx.config)
        # Cached values of a context depend on its options.
        rung.ctx = replace(ctx, given=given, config=config)
        quiet = replace(rung.ctx, progress=silent)
        planned = replanned(head, quiet)
        resume = None if self._workdir is None else Resume(self._workdir, planned, quiet)
        runner = Runner(self._begun.runner.passes, resume)
        rung.state = runner.part("ranges", "reconstruct").run(planned, quiet)
        rung.place = len(self._attempts)
        packed = Runner(runner.passes).part("write", "rest").run(rung.state, quiet)
        self._score("candidate", packed, rung, began)

    def _finished(self, rung: _Rung) -> Kept:
        """Run the passes that candidates leave out, and keep the optimization if its file keeps the score."""
        runner, began = (
            Runner(self._begun.runner.passes, None, self._begun.runner.seconds),
            time.perf_counter(),
        )
        state, place = rung.state, rung.place
        if rung.ctx.config.optimizes and 1 + len(self._attempts) < self._accuracy.max_evaluations:
            optimized = runner.part("optimize", "optimize").run(state, rung.ctx)
            if _digest(optimized.rounding) == _digest(state.rounding):
                state = optimized
            else:
                packed = runner.part("write", "rest").run(optimized, rung.ctx)
                self._score("optimized", packed, rung, began)
                ours, theirs = self._attempts[-1], self._attempts[place]
                if ours.passed or ours.drop <= theirs.drop:
                    last = len(self._attempts) - 1
                    return self._kept(runner.part("verify").run(packed, rung.ctx), rung.ctx, last)
                state = state.noting(
                    "the network-wise optimization is left out: the score of its file misses the limit"
                )
        return self._kept(runner.part("write").run(state, rung.ctx), rung.ctx, place)

    def _kept(self, state: State, ctx: Context, place: int) -> Kept:
        accuracy = self._accuracy
        trail = Trail(
            float_score=self._float,
            higher_is_better=accuracy.higher_is_better,
            max_drop="" if accuracy.max_drop is None else str(accuracy.max_drop),
            most=None if accuracy.max_drop is None else float(self._most),
            attempts=tuple(self._attempts),
            chosen=place,
            computed_by=self._computed_by,
            unavailable=tuple(self._unavailable),
        )
        total = self._accuracy.max_evaluations
        self._ctx.progress("score", total, total)
        return Kept(state, ctx, trail)

    def _score(self, what: str, state: State, rung: _Rung | None, began: float) -> None:
        """Score the file of a state, in the target's runtime."""
        path, prepared = self._folder / "candidate.onnx", self._begun.prepared
        io.save(store.load_all(final(sink(state.packed), prepared.opset, prepared.ir_version)), path)
        size = sum(f.stat().st_size for f in self._folder.iterdir())
        with quantized_model(path, self._runtime, self._threads) as (model, who, why):
            score = score_of(self._evaluate, model, finite=False)
        for file in self._folder.iterdir():
            file.unlink()
        self._computed_by = who
        if why:
            self._unavailable[f"scores in the runtime of {self._ctx.target.name}: {why}"] = None
        drop = self._float - score if self._accuracy.higher_is_better else score - self._float
        self._attempts.append(
            Attempt(
                what=what,
                score=score,
                drop=drop if np.isfinite(drop) else np.inf,
                passed=bool(drop <= self._most),
                spared=0 if rung is None else rung.spared,
                bits=() if rung is None else rung.rules.bits,
                exclude=() if rung is None else rung.rules.exclude,
                noise=None if rung is None else rung.noise,
                bytes=size,
                seconds=round(time.perf_counter() - began, 2),
            )
        )
        self._tell(1 + len(self._attempts), f"{score:.5g}")

    def _tell(self, done: int, detail: str = "") -> None:
        total = self._accuracy.max_evaluations
        self._ctx.progress("score", min(done, total - 1), total, detail)

    @cached_property
    def _runtime(self) -> Verifier | None:
        target = self._ctx.target
        if target.verifier == "none":
            self._unavailable[f"scores in the target's runtime: {target.name} names none"] = None
            return None
        try:
            return runtimes.make(target.verifier)
        except InstallError as e:
            self._unavailable[f"scores in the runtime of {target.name}: {e}".rstrip(".")] = None
            return None


def _digest(rounding: Rounding) -> str:
    return encode((rounding.integers, rounding.weights, rounding.grids, rounding.biases), HashOnly())
