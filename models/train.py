"""Retrain the shipped models, without PyTorch: gradients from eptq_onnx's own engines, updates in numpy.

    python models/train.py [NAME ...]      writes <name>.onnx, and the calibration and evaluation data, beside
    itself; the model of `eptq-onnx demo`, into the package

The digits are scikit-learn's; the shapes are drawn. Takes about five minutes on two cores.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import shapes
from nets import NETS, Net
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper
from sklearn.datasets import load_digits

from eptq_onnx import demo, engines, ops
from eptq_onnx.graph import edit
from eptq_onnx.graph.lower import lower
from eptq_onnx.graph.view import GraphView
from eptq_onnx.numerics.optimizers import Adam
from eptq_onnx.runtime import Session

HERE = Path(__file__).resolve().parent
BATCH = 64
EVALUATION = 797
Array = NDArray[np.float32]


@dataclass(frozen=True)
class Task:
    """Images, and the targets of the loss: one array per loss input."""

    images: Array
    targets: dict[str, Array]
    epochs: int


def digits_task() -> Task:
    """The first 1,000 digits; the other 797 are for evaluation."""
    images, labels = _digits()
    order = np.random.default_rng(0).permutation(len(images))[:-EVALUATION]
    return Task(images[order], {"one_hot": np.eye(10, dtype=np.float32)[labels[order]]}, epochs=60)


def segmentation_task() -> Task:
    """Drawn shapes and their class maps."""
    data = shapes.draw(3072, seed=1)
    return Task(shapes.as_input(data.images), {"one_hot": _one_hot_maps(data.classes)}, epochs=14)


def detection_task() -> Task:
    """Drawn shapes and, per cell of each stride, whether an object is centred there, which, and its sides."""
    data = shapes.draw(4096, seed=1)
    targets = {name: _cell_targets(data.boxes, stride) for name, stride in (("fine", 4), ("coarse", 8))}
    return Task(shapes.as_input(data.images), {f"{n}_target": t for n, t in targets.items()}, epochs=30)


def demo_task() -> Task:
    """Drawn pictures of one shape each, as the package draws them."""
    pictures = demo.draw(6144, seed=0)
    classes = np.eye(len(demo.CLASSES), dtype=np.float32)
    return Task(pictures.as_input(), {"one_hot": classes[pictures.labels]}, epochs=24)


TASKS = {
    "demo": demo_task,
    "digits_resnet": digits_task,
    "digits_mobile": digits_task,
    "shapes_detector": detection_task,
    "shapes_segmenter": segmentation_task,
}


def _digits() -> tuple[Array, NDArray[np.int64]]:
    data = load_digits()
    return (data.images[:, None] / 16).astype(np.float32), data.target


def _one_hot_maps(classes: NDArray[np.uint8]) -> Array:
    return np.ascontiguousarray(np.eye(4, dtype=np.float32)[classes].transpose(0, 3, 1, 2))


def _cell_targets(boxes: Array, stride: int) -> Array:
    """Per cell (object, three classes, left, top, right, bottom): shape (n, 8, cells, cells).

    Boxes up to 14 pixels wide belong to stride 4, larger ones to stride 8. Sides are in units of the stride.
    """
    cells = shapes.SIZE // stride
    result = np.zeros((len(boxes), 8, cells, cells), np.float32)
    for n, rows in enumerate(boxes):
        for kind, left, top, right, bottom in rows:
            small = max(right - left, bottom - top) <= 14
            if kind < 0 or small != (stride == 4):
                continue
            cx, cy = (left + right) / 2, (top + bottom) / 2
            i, j = int(cy // stride), int(cx // stride)
            px, py = (j + 0.5) * stride, (i + 0.5) * stride
            result[n, :, i, j] = 0
            result[n, [0, 1 + int(kind)], i, j] = 1
            result[n, 4:, i, j] = np.array([px - left, py - top, right - px, bottom - py]) / stride
    return result


# ---- losses, as graph nodes --------------------------------------------------------------------------------
def add_loss(model: ModelProto, name: str) -> None:
    """Append the loss of a task to its training graph; the output is ``loss``."""
    b = edit.Builder(model)
    if name == "shapes_detector":
        terms = [_detection_loss(b, output) for output in ("fine", "coarse")]
        b.add("Add", terms, "loss")
        inputs: dict[str, list[str | int | None]] = {
            f"{o}_target": ["N", 8, "H_" + o, "H_" + o] for o in ("fine", "coarse")
        }
    else:
        scores = model.graph.output[0]
        sizes = [d.dim_value for d in scores.type.tensor_type.shape.dim]
        log = b.add("LogSoftmax", [scores.name], axis=1)
        picked = b.reduce("ReduceSum", b.add("Mul", [log, "one_hot"]), [1])
        b.add("Neg", [b.reduce("ReduceMean", picked, None)], "loss")
        inputs = {"one_hot": ["N", *sizes[1:]]}
    for target, shape in inputs.items():
        model.graph.input.append(helper.make_tensor_value_info(target, TensorProto.FLOAT, shape))
    model.graph.node.extend(b.nodes)
    model.graph.initializer.extend(b.initializers)


def _detection_loss(b: edit.Builder, output: str) -> str:
    """Binary cross-entropy of object and class scores, L1 of the sides; the latter two in cells with an
    object."""
    sizes = b.constant(np.array([1, 3, 4], np.int64), "parts")
    score, kind, sides = f"{output}/score", f"{output}/kind", f"{output}/side"
    b.add("Split", [output, sizes], outputs=[score, kind, sides], axis=1)
    real, real_kind, real_sides = f"{output}/real", f"{output}/real_kind", f"{output}/real_side"
    b.add("Split", [f"{output}_target", sizes], outputs=[real, real_kind, real_sides], axis=1)
    count = b.add("Add", [b.reduce("ReduceSum", real, None), b.constant(1.0)])
    presence = b.reduce("ReduceSum", _cross_entropy(b, score, real), None)
    which = b.reduce("ReduceSum", b.add("Mul", [_cross_entropy(b, kind, real_kind), real]), None)
    off = b.add("Mul", [b.add("Abs", [b.add("Sub", [sides, real_sides])]), real])
    total = b.add("Add", [b.add("Add", [presence, which]), b.reduce("ReduceSum", off, None)])
    return b.add("Div", [total, count])


def _cross_entropy(b: edit.Builder, x: str, target: str) -> str:
    """softplus(x) - x t."""
    tail = b.add("Log", [b.add("Add", [b.add("Exp", [b.add("Neg", [b.add("Abs", [x])])]), b.constant(1.0)])])
    return b.add("Sub", [b.add("Add", [b.add("Relu", [x]), tail]), b.add("Mul", [x, target])])


# ---- training ----------------------------------------------------------------------------------------------
def train(name: str) -> ModelProto:
    """Train a network and return the model to ship."""
    task = TASKS[name]()
    parameters: dict[str, Array] = {}
    net = Net(parameters, training=True)
    model = NETS[name](net)
    statistics = list(net.statistics)
    add_loss(model, name)
    feeds_shape = {
        "image": (BATCH, *task.images.shape[1:]),
        **{n: (BATCH, *t.shape[1:]) for n, t in task.targets.items()},
    }
    fixed, _ = lower(edit.specialize(model, feeds_shape), ops.LOWERINGS)
    edit.set_outputs(fixed, ["loss", *statistics])
    learned = [p for p in parameters if GraphView(fixed).is_constant(p)]
    gradient = engines.make().differentiate(fixed, "loss", learned)
    edit.set_outputs(gradient.model, ["loss", *statistics, *gradient.gradients.values()])
    session = Session(gradient.model)
    optimizer = Adam({n: parameters[n] for n in learned})
    running: dict[str, Array] = {}
    rng = np.random.default_rng(0)
    steps = task.epochs * (len(task.images) // BATCH)
    began = time.perf_counter()
    for step in range(steps):
        chosen = rng.choice(len(task.images), BATCH, replace=False)
        feeds = {"image": task.images[chosen], **{n: t[chosen] for n, t in task.targets.items()}}
        values = session.run({**feeds, **{n: parameters[n] for n in learned}})
        rate = 4e-3 * 0.5 * (1 + np.cos(np.pi * step / steps))
        optimizer.step({n: values[g].astype(np.float32) for n, g in gradient.gradients.items()}, rate)
        for key in statistics:
            value = values[key].reshape(-1).astype(np.float32)
            running[key] = value if key not in running else 0.95 * running[key] + np.float32(0.05) * value
        if step % 50 == 0 or step == steps - 1:
            print(
                f"{name}: step {step + 1}/{steps}, loss {float(values['loss']):.4f}, "
                f"{time.perf_counter() - began:.0f} s",
                flush=True,
            )
    parameters.update(running)
    result = NETS[name](Net(parameters, training=False))
    onnx.checker.check_model(result, full_check=True)
    return result


def write_data() -> None:
    """Calibration data (unlabelled, from the training sets) and labelled evaluation data."""
    images, labels = _digits()
    order = np.random.default_rng(0).permutation(len(images))
    np.savez_compressed(HERE / "digits_calib.npz", image=images[order[:256]])
    held = order[-EVALUATION:]
    np.savez_compressed(HERE / "digits_eval.npz", image=images[held], labels=labels[held].astype(np.uint8))
    np.savez_compressed(HERE / "shapes_calib.npz", image=shapes.as_input(shapes.draw(128, seed=1).images))
    unseen = shapes.draw(256, seed=2)
    np.savez_compressed(
        HERE / "shapes_eval.npz", image=unseen.images, classes=unseen.classes, boxes=unseen.boxes
    )


def main() -> None:
    """Train the models named on the command line, or all."""
    write_data()
    for name in sys.argv[1:] or NETS:
        onnx.save(train(name), demo.MODEL if name == "demo" else HERE / f"{name}.onnx")


if __name__ == "__main__":
    main()
