"""Score a shipped model, or a quantized version of it, on its labelled evaluation data.

    python models/score.py NAME FILE.onnx [FILE.onnx ...]      NAME is one of the models in this folder

Prints accuracy (classifiers), mAP at IoU 0.5 (detector) or mean IoU (segmenter), file size, and time relative
to the first file, measured in turn in one run.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import shapes
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from eptq_onnx.runtime import Session

HERE = Path(__file__).resolve().parent
Array = NDArray[Any]
Outputs = dict[str, Array]


# ---- metrics: (outputs, evaluation data) -> score ----------------------------------------------------------
def top1(outputs: Outputs, data: dict[str, Array]) -> float:
    """Share of the images whose largest logit is the label's."""
    return float((outputs["logits"].argmax(axis=1) == data["labels"]).mean())


def mean_iou(outputs: Outputs, data: dict[str, Array]) -> float:
    """Intersection over union, averaged over the background and the three classes."""
    guess, truth = outputs["logits"].argmax(axis=1), data["classes"]
    hits = [
        ((guess == c) & (truth == c)).sum() / max(1, ((guess == c) | (truth == c)).sum()) for c in range(4)
    ]
    return float(np.mean(hits))


def mean_ap(outputs: Outputs, data: dict[str, Array]) -> float:
    """Mean over the classes of the average precision at IoU 0.5 (all-point interpolation)."""
    found = [_detections(outputs, n) for n in range(len(data["boxes"]))]
    return float(
        np.mean([_average_precision(found, data["boxes"], kind) for kind in range(len(shapes.CLASSES))])
    )


def _detections(outputs: Outputs, n: int) -> NDArray[np.float64]:
    """Rows (class, score, left, top, right, bottom) of one image, after non-maximum suppression."""
    rows = []
    for name, stride in (("fine", 4), ("coarse", 8)):
        cell = outputs[name][n].astype(np.float64)
        i, j = np.mgrid[: cell.shape[1], : cell.shape[2]] + 0.5
        box = np.stack([j - cell[4], i - cell[5], j + cell[6], i + cell[7]]) * stride
        kind = cell[1:4].argmax(axis=0)
        score = cell[0] * cell[1:4].max(axis=0)
        rows.append(np.concatenate([kind[None], score[None], box]).reshape(6, -1).T)
    table = np.concatenate(rows)
    table = table[table[:, 1] > 0.02]
    table = table[np.argsort(-table[:, 1], kind="stable")]
    kept: list[NDArray[np.float64]] = []
    for row in table:
        if all(row[0] != other[0] or _iou(row[2:], other[2:]) < 0.5 for other in kept):
            kept.append(row)
    return np.array(kept).reshape(-1, 6)


def _iou(a: Array, b: Array) -> float:
    low, high = np.maximum(a[:2], b[:2]), np.minimum(a[2:], b[2:])
    inside = float(np.prod(np.clip(high - low, 0, None)))
    return inside / (float(np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2])) - inside + 1e-9)


def _average_precision(found: list[NDArray[np.float64]], truth: Array, kind: int) -> float:
    rows = sorted(
        ((-r[1], n, k) for n, table in enumerate(found) for k, r in enumerate(table) if r[0] == kind)
    )
    total = int((truth[:, :, 0] == kind).sum())
    used: set[tuple[int, int]] = set()
    hits = []
    for _, n, k in rows:
        candidates = [
            (_iou(found[n][k, 2:], box[1:]), b)
            for b, box in enumerate(truth[n])
            if box[0] == kind and (n, b) not in used
        ]
        best = max(candidates, default=(0.0, -1))
        hits.append(best[0] >= 0.5)
        if hits[-1]:
            used.add((n, best[1]))
    right = np.cumsum(hits)
    precision = right / np.arange(1, len(hits) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float((envelope * np.array(hits)).sum() / max(total, 1))


# ---- models ------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Entry:
    """A shipped model: its data, and how it is scored."""

    data: str
    metric: Callable[[Outputs, dict[str, Array]], float]
    label: str


MODELS = {
    "digits_resnet": Entry("digits", top1, "top-1"),
    "digits_mobile": Entry("digits", top1, "top-1"),
    "shapes_detector": Entry("shapes", mean_ap, "mAP50"),
    "shapes_segmenter": Entry("shapes", mean_iou, "mIoU"),
}


def outputs_of(name: str, model: str | Path) -> Outputs:
    """What a file makes of the evaluation data of the shipped model ``name``."""
    image = _evaluation_data(name)["image"]
    image = shapes.as_input(image) if image.dtype == np.uint8 else image
    session = Session(model)
    parts = [session.run({"image": image[k : k + 64]}) for k in range(0, len(image), 64)]
    return {o: np.concatenate([p[o] for p in parts]) for o in session.outputs}


def evaluate(name: str, model: str | Path) -> float:
    """Score of a file on the evaluation data of the shipped model ``name``."""
    return rate(name, outputs_of(name, model))


def rate(name: str, outputs: Outputs) -> float:
    """Score of what `outputs_of` gives."""
    return MODELS[name].metric(outputs, _evaluation_data(name))


@cache
def _evaluation_data(name: str) -> dict[str, Array]:
    with np.load(HERE / f"{MODELS[name].data}_eval.npz") as archive:
        return {k: archive[k] for k in archive.files}


def relative_times(name: str, models: list[Path], repeats: int = 20) -> list[float]:
    """Median run time of each file on one batch, relative to the first; the files take turns."""
    with np.load(HERE / f"{MODELS[name].data}_calib.npz") as archive:
        image = archive["image"][:64]
    sessions = [Session(m) for m in models]
    times: list[list[float]] = [[] for _ in models]
    for _ in range(repeats):
        for k, session in enumerate(sessions):
            began = time.perf_counter()
            session.run({"image": image})
            times[k].append(time.perf_counter() - began)
    medians = [float(np.median(t)) for t in times]
    return [m / medians[0] for m in medians]


def main() -> None:
    """Print the table."""
    name, files = sys.argv[1], [Path(f) for f in sys.argv[2:]]
    table = Table("file", MODELS[name].label, "size (kB)", "time", title=name, title_justify="left")
    for file, ratio in zip(files, relative_times(name, files), strict=True):
        table.add_row(
            file.name, f"{evaluate(name, file):.4f}", f"{file.stat().st_size / 1000:.0f}", f"{ratio:.2f}x"
        )
    Console().print(table)


if __name__ == "__main__":
    main()
