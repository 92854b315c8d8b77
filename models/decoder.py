"""A byte-level decoder with a cache of keys and values, trained without PyTorch on text that Python ships.

    python models/decoder.py [OUTPUT]      writes decoder.onnx: 1.7 million weights

The text is the help topics of ``pydoc``; every fourth is held out. `calibration` and `held` give feeds:

    cd models
    python ../tools/bench_blocks.py decoder.onnx --data decoder:calibration --held decoder:held --sizes 4,8,32
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Annotated, Any

import numpy as np
import onnx
import typer
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper

from eptq_onnx import engines, ops
from eptq_onnx.graph import edit
from eptq_onnx.graph.lower import lower
from eptq_onnx.numerics.optimizers import Adam
from eptq_onnx.runtime import Session

Weights = Mapping[str, NDArray[np.float32]]
_OPSET = 17
_FAR = -1e9
"""What a masked score gets."""


class Graph:
    """A graph in the making."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}
        self._count = 0

    def constant(self, value: Any, name: str = "") -> str:
        """Add a constant; Python's numbers become float32 and int64."""
        array = np.asarray(value, np.float32 if isinstance(value, float) else None)
        name = name or f"{array.dtype.name}_{array.ndim}_{'_'.join(map(str, array.reshape(-1).tolist()))}"
        self.constants.setdefault(
            name, numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name)
        )
        return name

    def __call__(self, op: str, *inputs: Any, output: str = "", **attributes: Any) -> str:
        """Add a node; inputs that are no names are constants."""
        self._count += 1
        name = output or f"{op}_{self._count}"
        reads = [i if isinstance(i, str) else self.constant(i) for i in inputs]
        self.nodes.append(helper.make_node(op, reads, [name], name=f"node_{self._count}_{op}", **attributes))
        return name

    def split(self, x: str, count: int, axis: int) -> list[str]:
        """Split a tensor evenly."""
        self._count += 1
        names = [f"part_{self._count}_{k}" for k in range(count)]
        self.nodes.append(helper.make_node("Split", [x], names, name=f"node_{self._count}_Split", axis=axis))
        return names

    def model(
        self, inputs: Mapping[str, tuple[int, list[Any]]], outputs: Mapping[str, list[Any]]
    ) -> ModelProto:
        """Return the model; inputs have types and shapes, outputs are float."""
        graph = helper.make_graph(
            self.nodes,
            "net",
            [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()],
            [
                helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
                for name, shape in outputs.items()
            ],
            list(self.constants.values()),
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=8)


@dataclass(frozen=True)
class Sizes:
    """Sizes of a Llama."""

    layers: int
    heads: int
    groups: int
    theta: float
    epsilon: float


def decoder(weights: Weights, sizes: Sizes, *, cached: bool = True) -> ModelProto:
    """Llama with tied embeddings; it takes tokens with what it keeps of those before them, and gives both.

    Parameters
    ----------
    weights : mapping of str to ndarray
        By their names in GGUF files, of shape (outputs, terms).
    sizes : Sizes
    cached : bool
        False for the network without a past, to train.
    """
    g = Graph()
    width = weights["token_embd.weight"].shape[1]
    head = width // sizes.heads

    def weight(name: str, turned: bool = False) -> str:
        value = weights[name]
        return g.constant(value.T if turned else value, f"{name}_T" if turned else name)

    def normed(x: str, name: str) -> str:
        mean = g("ReduceMean", g("Mul", x, x), axes=[-1], keepdims=1)
        return g("Mul", g("Div", x, g("Sqrt", g("Add", mean, sizes.epsilon))), weight(f"{name}.weight"))

    ids = "input_ids"
    past, length = g("Gather", g("Shape", "past_key_0"), 2) if cached else 0, g("Gather", g("Shape", ids), 1)
    end = g("Add", past, length)
    places = g("Range", past, end, 1)
    rates = (sizes.theta ** (-np.arange(0, head, 2) / head)).astype(np.float32)
    angles = g(
        "Mul",
        g("Unsqueeze", g("Cast", places, to=TensorProto.FLOAT), np.array([1])),
        g.constant(rates, "rates"),
    )
    angles = g("Concat", angles, angles, axis=-1)
    cosine, sine = g("Cos", angles), g("Sin", angles)
    later = g(
        "Greater", g("Unsqueeze", g("Range", 0, end, 1), np.array([0])), g("Unsqueeze", places, np.array([1]))
    )
    hidden = g("Where", later, _FAR, 0.0)

    def turned(x: str) -> str:
        first, second = g.split(x, 2, -1)
        other = g("Concat", g("Neg", second), first, axis=-1)
        return g("Add", g("Mul", x, cosine), g("Mul", other, sine))

    x = g("Gather", weight("token_embd.weight"), ids)
    inputs: dict[str, tuple[int, list[Any]]] = {ids: (TensorProto.INT64, ["batch", "tokens"])}
    outputs: dict[str, list[Any]] = {"logits": ["batch", "tokens", weights["token_embd.weight"].shape[0]]}
    for k in range(sizes.layers):
        y = normed(x, f"blk.{k}.attn_norm")
        q, key, v = (
            g(
                "Transpose",
                g(
                    "Reshape",
                    g("MatMul", y, weight(f"blk.{k}.attn_{n}.weight", True)),
                    np.array([0, 0, count, head]),
                ),
                perm=[0, 2, 1, 3],
            )
            for n, count in (("q", sizes.heads), ("k", sizes.groups), ("v", sizes.groups))
        )
        q, key = turned(q), turned(key)
        kept = []
        for name, own in (("key", key), ("value", v)):
            whole = own
            if cached:
                inputs[f"past_{name}_{k}"] = (TensorProto.FLOAT, ["batch", sizes.groups, "past", head])
                outputs[f"present_{name}_{k}"] = ["batch", sizes.groups, "all", head]
                whole = g("Concat", f"past_{name}_{k}", own, axis=2, output=f"present_{name}_{k}")
            # Several heads read one key.
            many = np.array([1, 1, sizes.heads // sizes.groups, 1, 1])
            kept.append(
                g(
                    "Reshape",
                    g("Tile", g("Unsqueeze", whole, np.array([2])), many),
                    np.array([0, sizes.heads, -1, head]),
                )
            )
        scores = g("Mul", g("MatMul", q, g("Transpose", kept[0], perm=[0, 1, 3, 2])), float(head**-0.5))
        mixed = g("MatMul", g("Softmax", g("Add", scores, hidden), axis=-1), kept[1])
        mixed = g("Reshape", g("Transpose", mixed, perm=[0, 2, 1, 3]), np.array([0, 0, width]))
        x = g("Add", x, g("MatMul", mixed, weight(f"blk.{k}.attn_output.weight", True)))
        y = normed(x, f"blk.{k}.ffn_norm")
        gate = g("MatMul", y, weight(f"blk.{k}.ffn_gate.weight", True))
        inner = g(
            "Mul", g("Mul", gate, g("Sigmoid", gate)), g("MatMul", y, weight(f"blk.{k}.ffn_up.weight", True))
        )
        x = g("Add", x, g("MatMul", inner, weight(f"blk.{k}.ffn_down.weight", True)))
    table = g("Transpose", weight("token_embd.weight"), perm=[1, 0])
    g("MatMul", normed(x, "output_norm"), table, output="logits")
    return g.model(inputs, outputs)


# ---- training ----------------------------------------------------------------------------------------------
SIZES = Sizes(layers=4, heads=6, groups=3, theta=10000.0, epsilon=1e-5)
WIDTH, INNER, SYMBOLS = 192, 512, 256
LENGTH, BATCH, STEPS = 128, 16, 800
_RATE = 3e-3


def text(*, held_out: bool) -> NDArray[np.int64]:
    """Bytes of the topics to learn, or of those that are held out."""
    names = sorted(topics)
    chosen = [n for k, n in enumerate(names) if (k % 4 == 0) is held_out]
    return np.frombuffer("\n\n".join(topics[n] for n in chosen).encode(), np.uint8).astype(np.int64)


def initial(sizes: Sizes, width: int, inner: int, symbols: int) -> dict[str, NDArray[np.float32]]:
    """Random weights."""
    rng = np.random.default_rng(0)
    keys = width // sizes.heads * sizes.groups
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (symbols, width),
        "output_norm.weight": (width,),
    }
    for k in range(sizes.layers):
        of_layer = {"attn_q": (width, width), "attn_k": (keys, width), "attn_v": (keys, width)}
        of_layer |= {"attn_output": (width, width), "ffn_gate": (inner, width), "ffn_up": (inner, width)}
        shapes |= {f"blk.{k}.{name}.weight": shape for name, shape in of_layer.items()}
        shapes[f"blk.{k}.ffn_down.weight"] = (width, inner)
        shapes |= {f"blk.{k}.{name}_norm.weight": (width,) for name in ("attn", "ffn")}
    return {
        name: np.ones(shape, np.float32)
        if len(shape) == 1
        else (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)
        for name, shape in shapes.items()
    }


def train(
    weights: dict[str, NDArray[np.float32]],
    sizes: Sizes,
    steps: int,
    length: int = LENGTH,
    batch: int = BATCH,
) -> list[float]:
    """Train the weights, in place, and return the losses."""
    symbols = len(weights["token_embd.weight"])
    model = decoder(weights, sizes, cached=False)
    b = edit.Builder(model)
    picked = b.reduce("ReduceSum", b.add("Mul", [b.add("LogSoftmax", ["logits"], axis=-1), "wanted"]), [2])
    b.add("Neg", [b.reduce("ReduceMean", picked, None)], "loss")
    wanted = helper.make_tensor_value_info("wanted", TensorProto.FLOAT, ["batch", "tokens", symbols])
    model.graph.input.append(wanted)
    model.graph.node.extend(b.nodes)
    model.graph.initializer.extend(b.initializers)
    shapes = {"input_ids": (batch, length), "wanted": (batch, length, symbols)}
    fixed, _ = lower(edit.specialize(model, shapes), ops.LOWERINGS)
    edit.set_outputs(fixed, ["loss"])
    constants = {t.name: t for t in fixed.graph.initializer}
    learned = {
        n: numpy_helper.to_array(constants[n]).copy() for n in constants if n.removesuffix("_T") in weights
    }
    gradient = engines.make().differentiate(fixed, "loss", list(learned))
    edit.set_outputs(gradient.model, ["loss", *gradient.gradients.values()])
    session, optimizer = Session(gradient.model), Adam(learned)
    rng, source = np.random.default_rng(0), text(held_out=False) % symbols
    one_hot, losses, began = np.eye(symbols, dtype=np.float32), [], time.perf_counter()
    for step in range(steps):
        begins = rng.integers(0, len(source) - length - 1, batch)
        rows = np.stack([source[k : k + length + 1] for k in begins])
        values = session.run({"input_ids": rows[:, :-1], "wanted": one_hot[rows[:, 1:]], **learned})
        rate = _RATE * min(1.0, (step + 1) / 50) * 0.5 * (1 + np.cos(np.pi * step / steps))
        optimizer.step({n: values[g].astype(np.float32) for n, g in gradient.gradients.items()}, rate)
        losses.append(float(values["loss"]))
        if step % 50 == 0 or step == steps - 1:
            seconds = time.perf_counter() - began
            print(f"decoder: step {step + 1}/{steps}, loss {losses[-1]:.3f}, {seconds:.0f} s", flush=True)
    for name, value in learned.items():
        weights[name.removesuffix("_T")] = value.T if name.endswith("_T") else value
    return losses


# ---- data --------------------------------------------------------------------------------------------------
def feeds(
    source: NDArray[np.int64], count: int, length: int, sizes: Sizes = SIZES
) -> Iterator[dict[str, Any]]:
    """Yield parts of a text as prompts without a past."""
    head = WIDTH // sizes.heads
    empty = np.zeros((1, sizes.groups, 0, head), np.float32)
    past = {f"past_{name}_{k}": empty for name in ("key", "value") for k in range(sizes.layers)}
    for begin in np.linspace(0, len(source) - length, count).astype(np.int64):
        yield {"input_ids": source[None, begin : begin + length], **past}


def calibration() -> list[dict[str, Any]]:
    """Feeds to calibrate with, of two lengths."""
    source = text(held_out=False)
    return [*feeds(source, 64, LENGTH), *feeds(source, 64, LENGTH // 2)]


def held() -> list[dict[str, Any]]:
    """Feeds of text that training has not seen."""
    return list(feeds(text(held_out=True), 48, LENGTH))


def main(
    output: Annotated[Path, typer.Argument(help="The ONNX file.")] = Path(__file__).parent / "decoder.onnx",
    steps: Annotated[int, typer.Option(help="Steps of training.")] = STEPS,
) -> None:
    """Train the decoder, and write it with its cache."""
    weights = initial(SIZES, WIDTH, INNER, SYMBOLS)
    train(weights, SIZES, steps)
    onnx.save(decoder(weights, SIZES), output)


if __name__ == "__main__":
    typer.run(main)
