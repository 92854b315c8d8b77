"""Plots as inline SVG in the colours of the page; plain names of operators are the only texts of the user."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from eptq_onnx.diagnosis import Histogram
from eptq_onnx.numerics.types import Array
from eptq_onnx.outcome import OperatorTime, OptimizationTrace
from eptq_onnx.placement import FrontPoint

_INK, _LINE, _FIRST, _SECOND, _THIRD = "#010101", "#020202", "#030303", "#040404", "#050505"
"""Stand-ins for colours, which the page's style sheet chooses."""
_COLOURS = {
    _INK: "var(--ink)",
    _LINE: "var(--line)",
    _FIRST: "var(--first)",
    _SECOND: "var(--second)",
    _THIRD: "var(--third)",
}
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text: small, selectable, in the page's font
    "svg.hashsalt": "eptq-onnx",  # the same plot, the same bytes
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _LINE,
    "grid.linewidth": 0.5,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
}
_MOST_DB = 60.0
"""Ratios above are drawn there: they are as good as exact."""
_DECADE = 10.0
"""Ratio of the largest to the smallest value from which on an axis is logarithmic."""


@dataclass(frozen=True)
class Plot:
    """A plot of the page.

    Parameters
    ----------
    name : str
        Identifier, unique in the page.
    title, text : str
        What it is, and what it shows, for those who do not see it.
    """

    name: str
    title: str
    text: str

    def drawn(
        self, draw: Callable[[Any], None], size: tuple[float, float] = (7.5, 2.6), panels: int = 1
    ) -> Markup:
        """Return what ``draw`` draws as an SVG element.

        Parameters
        ----------
        draw : callable
            Takes the axes; a list of them if there are several panels side by side.
        size : tuple of float
            Width and height in inches.
        panels : int
        """
        with _styled():
            figure = Figure(figsize=size, layout="constrained")
            axes = figure.subplots(1, panels)
            draw(axes)
            buffer = io.StringIO()
            figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        return self._embedded(buffer.getvalue())

    def _embedded(self, svg: str) -> Markup:
        """Return a file of matplotlib as an element of a page."""
        body = svg[svg.index("<svg") :]
        body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
        body = body.replace("xlink:href", "href")
        box = re.search(r'viewBox="[^"]+"', body)
        body = body[body.index(">") + 1 :]
        # Identifiers are unique in a file, but a page holds several.
        for before, after in (('id="', ""), ('href="#', ""), ("url(#", "")):
            body = body.replace(before, f"{before}{self.name}-{after}")
        for colour, variable in _COLOURS.items():
            body = body.replace(colour, variable)
        body = re.sub(r"font: ([\d.]+)px [^;\"]+", r"font-size: \1px", body)
        title, text = escape(self.title), escape(self.text)
        return Markup(
            f'<svg {box[0] if box else ""} role="img" aria-labelledby="{self.name}-t {self.name}-d">'
            f'<title id="{self.name}-t">{title}</title><desc id="{self.name}-d">{text}</desc>{body}'
        )


@contextmanager
def _styled() -> Iterator[None]:
    with matplotlib.rc_context(rc=matplotlib.rcParamsDefault):
        parameters: Any = matplotlib.rcParams
        parameters.update(_STYLE)
        yield


def _legend(axes: Any, lines: Sequence[Any] | None = None) -> None:
    """Put the legend above the axes, where it covers nothing."""
    handles = axes.get_legend_handles_labels()[0] if lines is None else lines
    axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(handles), borderpad=0.2)


def _logarithmic(axes: Any) -> None:
    """Make the vertical axis logarithmic, with plain numbers at its ticks: formulas are not rendered."""
    axes.set_yscale("log")
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def by_layer(
    accumulated: Sequence[float], nearest: Sequence[float | None], own: Sequence[float | None]
) -> Markup:
    """Return the SQNR of each layer: the result, nearest rounding, and own noise."""
    numbers = np.arange(1, len(accumulated) + 1)

    def draw(axes: Any) -> None:
        for values, colour, label, form in (
            (own, _THIRD, "own noise", ":"),
            (nearest, _SECOND, "accumulated, weights rounded to nearest", "--"),
            (accumulated, _FIRST, "accumulated, result", "-"),
        ):
            ys = np.array([np.nan if y is None else min(y, _MOST_DB) for y in values])
            if np.isfinite(ys).any():
                axes.plot(numbers, ys, form, color=colour, label=label, marker="." if len(ys) < 80 else "")
        axes.set_xlabel("layer, in the order of execution")
        axes.set_ylabel("SQNR (dB)")
        axes.xaxis.get_major_locator().set_params(integer=True)
        _legend(axes)

    low = min(accumulated)
    text = f"{len(accumulated)} layers; the lowest accumulated ratio is {low:.1f} dB, at layer "
    text += f"{int(np.argmin(accumulated)) + 1}. The table of layers holds all figures."
    return Plot("by-layer", "SQNR by layer", text).drawn(draw)


def attention(weights: Array) -> Markup:
    """Return sample-layer attention as a map, layers from top to bottom."""

    def draw(axes: Any) -> None:
        shades = np.log10(np.maximum(weights, 1e-3 * max(float(weights.max()), 1e-30)))
        # Layers and samples are counted from 1, as in the table.
        ends = (0.5, weights.shape[1] + 0.5, weights.shape[0] + 0.5, 0.5)
        image = axes.imshow(shades, aspect="auto", cmap="viridis", interpolation="nearest", extent=ends)
        axes.grid(visible=False)
        axes.set_xlabel("sample")
        axes.set_ylabel("layer")
        bar = axes.figure.colorbar(image, ax=axes)
        bar.set_label("attention (log10)")
        bar.outline.set_edgecolor(_LINE)

    mean = weights.mean(axis=1)
    text = (
        f"{weights.shape[0]} layers and {weights.shape[1]} samples; layer {int(mean.argmax()) + 1} counts "
        f"most, layer {int(mean.argmin()) + 1} least. The table of layers holds the means."
    )
    return Plot("attention", "Attention of layers and samples", text).drawn(draw, (7.5, 3.2))


def histogram(found: Histogram, name: str) -> Markup:
    """Return a histogram with the range of its grid."""

    def draw(axes: Any) -> None:
        edges = np.linspace(found.low, found.high, len(found.counts) + 1)
        # Activations hold many zeros: a linear axis would show nothing else.
        axes.stairs(np.asarray(found.counts) + 0.5, edges, fill=True, color=_FIRST, baseline=0.5)
        _logarithmic(axes)
        for end in (found.least, found.most):
            axes.axvline(end, color=_SECOND, linestyle="--")
        axes.set_xlabel("value" if found.what == "input" else "steps of the scale")
        axes.set_ylabel("count")

    text = (
        f"Values from {found.low:.4g} to {found.high:.4g}; the grid represents {found.least:.4g} to "
        f"{found.most:.4g}, and {found.outside:.2%} of the values lie outside."
    )
    title = "Input" if found.what == "input" else "Weights"
    return Plot(name, title, text).drawn(draw, (3.6, 2.0))


def losses(trace: OptimizationTrace) -> Markup:
    """Return the training loss and the held-out objective by step."""

    def draw(axes: Any) -> None:
        steps = np.arange(1, len(trace.losses) + 1)
        axes.plot(steps, trace.losses, color=_FIRST, linewidth=0.8, label="training loss")
        if min(trace.losses) > 0 and max(trace.losses) > _DECADE * min(trace.losses):
            _logarithmic(axes)
        axes.set_xlabel("step")
        axes.set_ylabel("training loss")
        if trace.checkpoints:
            other = axes.twinx()
            other.grid(visible=False)
            xs, ys = zip(*trace.checkpoints, strict=True)
            other.plot(xs, ys, "o--", color=_SECOND, label="held-out objective")
            other.spines["right"].set_visible(True)
            other.set_ylabel("held-out objective")
            kept = dict(trace.checkpoints).get(trace.best_step)
            if kept is not None:
                other.plot([trace.best_step], [kept], "D", color=_THIRD, label="kept")
            lines = [*axes.get_lines(), *other.get_lines()]
            _legend(axes, lines)

    text = f"{trace.steps} steps; the candidate of step {trace.best_step} was kept: {trace.reason}."
    return Plot("losses", "Loss by step", text).drawn(draw)


def front(points: Sequence[FrontPoint]) -> Markup:
    """Return noise against time, size and bits, one panel each."""
    large = max((p.bytes or 0 for p in points), default=0) >= 1e6
    kinds = [
        (
            label,
            [(getattr(p, name) * unit, p.noise, p.chosen) for p in points if getattr(p, name) is not None],
        )
        for name, unit, label in (
            ("seconds", 1e3, "time of one run (ms)"),
            ("bytes", 1e-6 if large else 1e-3, f"size of the file ({'MB' if large else 'kB'})"),
            ("bits", 1.0, "mean bits of a weight"),
            ("activation_bits", 1.0, "mean bits of an activation"),
        )
    ]
    kinds = [(label, values) for label, values in kinds if values]

    def draw(axes: Any) -> None:
        for place, (label, values) in zip(np.atleast_1d(axes), kinds, strict=True):
            # What was chosen may be limited in another unit, and then lies beside the line.
            others = [value for value in sorted(values) if not value[2]]
            chosen = [value for value in values if value[2]]
            noises = [y for _, y, _ in others]
            # What was limited in another unit is a cloud of points in this one.
            form = "o-" if noises == sorted(noises, reverse=True) else "o"
            place.plot([x for x, *_ in others], noises, form, color=_FIRST, markersize=4)
            place.plot([x for x, *_ in chosen], [y for _, y, _ in chosen], "D", color=_SECOND, label="chosen")
            ys = [y for _, y, _ in values]
            if min(ys) > 0 and max(ys) > _DECADE * min(ys):
                _logarithmic(place)
            place.set_xlabel(label)
            place.set_ylabel("noise at the outputs")
            if chosen:
                _legend(place)

    text = f"{len(points)} choices with the least noise for their time and size; the table beside holds them."
    return Plot("front", "Noise against time and size", text).drawn(
        draw, (7.5 if len(kinds) > 1 else 4.5, 2.6), max(1, len(kinds))
    )


def sizes(points: Sequence[tuple[float, float, bool]], name: str) -> Markup:
    """Return quality against size; one entry a file: bytes, dB, and whether it is on the front."""
    large = max(x for x, *_ in points) >= 1e6
    unit = 1e-6 if large else 1e-3
    best = sorted((x * unit, y) for x, y, chosen in points if chosen)

    def draw(axes: Any) -> None:
        others = [(x * unit, y) for x, y, chosen in points if not chosen]
        axes.plot([x for x, _ in others], [y for _, y in others], "o", color=_SECOND, markersize=4)
        axes.plot([x for x, _ in best], [y for _, y in best], "o-", color=_FIRST, markersize=4)
        axes.set_xlabel(f"size of the file ({'MB' if large else 'kB'})")
        axes.set_ylabel("worst output (dB)")

    text = f"{len(points)} files, {len(best)} of them on the front; the table below holds them."
    return Plot(name, "Quality against size", text).drawn(draw)


def seconds(spent: Mapping[str, float], expected: Mapping[str, float]) -> Markup:
    """Return the time of each pass, and what was expected."""
    names = list(spent)

    def draw(axes: Any) -> None:
        places = np.arange(len(names))
        axes.barh(places, [spent[n] for n in names], 0.6, color=_FIRST, label="taken")
        marked = [k for k, n in enumerate(names) if n in expected]
        axes.plot(
            [expected[names[k]] for k in marked], marked, "|", color=_SECOND, label="expected", markersize=12
        )
        axes.set_yticks(places, names)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("seconds")
        _legend(axes)

    longest = max(names, key=lambda n: spent[n])
    text = f"{sum(spent.values()):.1f} s in all, of which {longest} took {spent[longest]:.1f} s."
    return Plot("seconds", "Time by pass", text).drawn(draw, (7.5, 0.6 + 0.2 * len(names)))


def operator_label(name: str, place: int) -> str:
    """Return the name of an operator if it is short and plain, and else its row in the table."""
    short = name.replace("QuantizeLinear/DequantizeLinear", "Q/DQ")
    return short if re.fullmatch(r"[A-Za-z][\w.+/ ]{0,29}", short, re.ASCII) else f"row {place + 1}"


def operators(times: Sequence[OperatorTime], name: str = "operators") -> Markup:
    """Return the time of each kind of operator in both models."""
    shown = times[:12]
    short = max((max(o.float_seconds, o.quantized_seconds) for o in shown), default=0.0) < 1e-3
    unit, what = (1e6, "microseconds") if short else (1e3, "milliseconds")

    def draw(axes: Any) -> None:
        places = np.arange(len(shown))
        axes.barh(places - 0.2, [o.float_seconds * unit for o in shown], 0.38, color=_SECOND, label="float")
        axes.barh(
            places + 0.2, [o.quantized_seconds * unit for o in shown], 0.38, color=_FIRST, label="quantized"
        )
        axes.set_yticks(places, [operator_label(o.operator, k) for k, o in enumerate(shown)])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(f"{what} of one run")
        _legend(axes)

    text = f"{len(shown)} kinds of operators; the table beside names them."
    return Plot(name, "Latency by operator", text).drawn(draw, (7.5, 0.7 + 0.3 * len(shown)))
