"""Fill the template of the page."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections import Counter
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from eptq_onnx.diagnosis import Histogram, Picture
from eptq_onnx.report import placement as by_time
from eptq_onnx.report.command import command_of
from eptq_onnx.report.console import shown
from eptq_onnx.report.facts import facts, kernel_sheet, layer_sheet, output_sheet, warnings_of
from eptq_onnx.report.front import front_sheet
from eptq_onnx.report.outputs import explained
from eptq_onnx.report.page import plots
from eptq_onnx.report.page.pictures import data_uri
from eptq_onnx.report.page.strip import strip
from eptq_onnx.report.plain import size_text
from eptq_onnx.report.sheet import Sheet
from eptq_onnx.report.speed import in_words, named_operators, operator_sheet, pace_in_words, time_text

if TYPE_CHECKING:
    from eptq_onnx.report import Report

_SECTIONS = {
    "advice": "What to try", "run": "The run", "accuracy": "Accuracy", "size": "Size", "speed": "Speed",
    "layers": "Layers", "network": "Network", "ranges": "Ranges", "attention": "Attention",
    "optimization": "Optimization", "front": "Noise against time and size", "samples": "Worst samples",
    "time": "Time", "notes": "Notes",
}  # fmt: skip
"""Sections in their order; a page holds those that it has something for."""


_ELSEWHERE = ("size", "parts", "speed", "model")
"""Facts that the page shows elsewhere."""


@dataclass(frozen=True)
class Tile:
    """A figure at the top of the page."""

    label: str
    value: str
    note: str


@dataclass(frozen=True)
class Part:
    """A part of the written file."""

    name: str
    size: str
    share: str
    width: float


@dataclass(frozen=True)
class Drawn:
    """A plot with its caption."""

    svg: Markup
    caption: str


@dataclass(frozen=True)
class Group:
    """The histograms of a layer."""

    layer: str
    plots: tuple[Drawn, ...]


@dataclass(frozen=True)
class Shown:
    """A sample in the page."""

    uri: Markup
    alt: str
    caption: str
    width: int
    height: int


def page_of(report: Report) -> str:
    """Return a report as one HTML page, which fetches nothing."""
    filled = {
        **_head(report),
        **_run(report),
        **_accuracy(report),
        **_speed(report),
        **_network(report),
        **_samples(report),
        "histograms": _histograms(report),
        "parts": _parts(report),
        "total_size": size_text(sum(report.sizes.values())),
    }
    absent = {
        "advice": not filled["advice"],
        "ranges": not filled["histograms"],
        "attention": filled["attention"] is None,
        "optimization": filled["losses"] is None,
        "front": filled["front"] is None,
        "samples": not filled["pictures"] and not filled["worst_samples"].rows,
        "notes": not report.notes,
    }
    contents = [(name, title) for name, title in _SECTIONS.items() if not absent.get(name)]
    return rendered("template.html.j2", report=report, contents=contents, **filled)


def rendered(template: str, **values: object) -> str:
    """Return a template filled with values, and with the style and the script of all pages."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_harmless
    )
    script = _content("page.js")
    return (
        environment.from_string(_content(template)).render(
            style=Markup(_content("page.css")),
            script=Markup(script),
            script_hash=f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}",
            **values,
        )
        + "\n"
    )


def _harmless(value: object) -> object:
    """Return a text without what would confuse a reader, such as characters that turn its direction.

    Escaping for HTML follows; what is HTML already stays as it is.
    """
    return shown(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _content(name: str) -> str:
    """Return a file that lies beside this module."""
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _head(report: Report) -> dict[str, Any]:
    v, speed = report.verification, report.speed
    ratio = v.float_bytes / max(v.quantized_bytes, 1)
    worst = min(v.statistics.items(), key=lambda item: item[1].sqnr_db, default=None)
    runs = Counter(node.runs for node in report.exhibits.network)
    tiles = [
        Tile(
            "size",
            f"{ratio:.2f}× smaller" if ratio >= 1 else "not smaller",
            f"{size_text(v.float_bytes)} → {size_text(v.quantized_bytes)}",
        ),
        _pace(report),
    ]
    if worst is not None:
        samples = "held-out samples" if v.held_out else "samples that calibration has seen"
        tiles.append(Tile("worst output", _db(worst[1].sqnr_db), f"{worst[0]}, on {v.samples} {samples}"))
    bits = Counter(x.bits for x in report.layers)
    tiles.append(
        Tile(
            "nodes on integers",
            f"{runs['integers']} of {sum(runs.values())}",
            ", ".join(f"{n} layer{'s' * (n > 1)} {name}" for name, n in bits.most_common(3)),
        )
    )
    return {
        "tiles": tiles,
        "warnings": [_sentence(text) for text in warnings_of(report)],
        "advice": report.advice,
        "worst": "" if worst is None else _db(worst[1].sqnr_db),
        "speed": _sentence(in_words(speed)),
    }


def _pace(report: Report) -> Tile:
    speed = report.speed
    if speed is None:
        return Tile("speed", "not measured", "")
    times = f"{time_text(speed.float_seconds)} → {time_text(speed.quantized_seconds)}, measured"
    return Tile("speed", pace_in_words(speed), times)


def _run(report: Report) -> dict[str, Any]:
    spent, expected = sum(report.seconds.values()), report.estimate.seconds
    return {
        "command": command_of(report.model, report.data, report.config),
        "options": [(name, json.dumps(value, ensure_ascii=False)) for name, value in report.config.items()],
        "facts": [(label, text) for label, text in facts(report) if label not in _ELSEWHERE],
        "seconds": plots.seconds(report.seconds, report.estimate.shares),
        "seconds_caption": f"{spent:.1f} s in all; {expected:.0f} s were expected before the run.",
    }


def _accuracy(report: Report) -> dict[str, Any]:
    v, layers, trace = report.verification, report.layers, report.optimization
    seen = (
        "No step of the quantization has seen these samples."
        if v.held_out
        else "Calibration has seen these samples, so others may fare worse."
    )
    attention = report.exhibits.attention
    return {
        "outputs": output_sheet(report),
        "compared": f"{seen} {explained(v.statistics.values())}".rstrip(),
        "by_layer": plots.by_layer(
            [x.sqnr_db for x in layers], [x.nearest_db for x in layers], [x.own_db for x in layers]
        )
        if layers
        else None,
        "layers_caption": "SQNR of each layer's quantized output; numbers are those of the table of layers.",
        "layers": layer_sheet(report),
        "attention": plots.attention(attention) if attention is not None and attention.size else None,
        "losses": plots.losses(trace) if trace is not None and trace.losses else None,
        "losses_caption": "" if trace is None else _sentence(trace.reason),
        "front": plots.front(report.front) if report.front else None,
        "front_sheet": front_sheet(report.front) if report.front else None,
    }


def _speed(report: Report) -> dict[str, Any]:
    speed, placement = report.speed, report.placement
    found = [] if speed is None or not speed.operators else [operator_sheet(speed)]
    return {
        "operators": plots.operators(named_operators(speed)) if speed is not None and found else None,
        "operators_caption": "Time of each kind of operator in one run, float and quantized. Kernels that "
        "stand for several operators have names of their own; layout is the change of the memory layout.",
        "speed_sheets": [*found, *(by_time.sheets(placement) if placement is not None else [])],
    }


def _network(report: Report) -> dict[str, Any]:
    network = report.exhibits.network
    runs = Counter(node.runs for node in network)
    floats = [(str(k + 1), n.node, n.op_type, n.why) for k, n in enumerate(network) if n.runs == "float"]
    return {
        "strip": strip(network) if network else None,
        "counts": {name: runs[name] for name in ("integers", "merged", "float", "other")},
        "float_nodes": Sheet(
            "Nodes in floating point", ("#", "node", "operator", "why"), tuple(floats), names=(1,)
        ),
        "kernels": kernel_sheet(report),
    }


def _parts(report: Report) -> list[Part]:
    total = max(1, sum(report.sizes.values()))
    most = max(report.sizes.values(), default=1) or 1
    return [
        Part(name, size_text(count), f"{count / total:.1%}", round(100 * count / most, 2))
        for name, count in report.sizes.items()
        if count
    ]


def _histograms(report: Report) -> list[Group]:
    found: dict[str, list[Drawn]] = {}
    for k, item in enumerate(report.exhibits.histograms):
        drawn = Drawn(plots.histogram(item, f"histogram-{k}"), _range_in_words(item))
        found.setdefault(item.layer, []).append(drawn)
    return [Group(layer, tuple(drawn)) for layer, drawn in found.items()]


def _range_in_words(item: Histogram) -> str:
    what = "Input" if item.what == "input" else "Weights"
    return f"{what}: {item.outside:.2%} outside [{item.least:.4g}, {item.most:.4g}]"


def _samples(report: Report) -> dict[str, Any]:
    pictures = report.exhibits.pictures
    recipe = report.data.recipe.get("image")
    worst = [(s.name or str(s.sample), _ratio(s.sqnr_db), s.output) for s in report.verification.worst]
    return {
        "pictures": [_shown(p) for p in pictures],
        "seen_as": f"The recipe --image '{recipe}' is undone."
        if recipe
        else "No recipe says how pixels became numbers: the smallest is black, the largest white.",
        "worst_samples": Sheet(
            "Samples on which the models differ most",
            ("sample", "SQNR (dB)", "output"),
            tuple(worst),
            names=(0, 2),
        ),
    }


def _shown(picture: Picture) -> Shown:
    height, width = picture.pixels.shape[:2]
    scale = 128 / max(height, width)
    noise = f"{picture.noise.output} {_db(picture.noise.sqnr_db)}"
    return Shown(
        Markup(data_uri(picture.pixels)),
        f"Sample {picture.name}",
        f"{picture.name}: {noise}",
        max(1, round(width * scale)),
        max(1, round(height * scale)),
    )


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:].rstrip('.')}."


def _db(value: float) -> str:
    return f"{value:.1f} dB" if math.isfinite(value) else "exact"


def _ratio(value: float) -> str:
    return f"{value:.1f}" if math.isfinite(value) else "exact"
