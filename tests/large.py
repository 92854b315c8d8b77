"""A language model in outline, of any size: a table that is looked up and layers behind it, written without
being in memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from onnx import NodeProto, TensorProto, helper, save

_PART = 2**22


def write_large_model(path: Path, *, words: int, width: int, blocks: int) -> None:
    """Write a model of about ``4 * width * (words + 2 * blocks * width)`` bytes, its weights in
    ``<path>.data``.

    int64 ids of shape (batch, 16) to float32 of shape (batch, 16, 32).
    """
    rng = np.random.default_rng(0)
    weights: list[TensorProto] = []
    with open(f"{path}.data", "wb") as data:

        def weight(name: str, *shape: int, scale: float) -> str:
            tensor = TensorProto(
                name=name, data_type=TensorProto.FLOAT, dims=shape, data_location=TensorProto.EXTERNAL
            )
            size = int(np.prod(shape))
            for key, value in (
                ("location", f"{path.name}.data"),
                ("offset", data.tell()),
                ("length", 4 * size),
            ):
                tensor.external_data.add(key=key, value=str(value))
            for begin in range(0, size, _PART):
                data.write(
                    (rng.standard_normal(min(_PART, size - begin), np.float32) * np.float32(scale)).tobytes()
                )
            weights.append(tensor)
            return name

        nodes = [
            helper.make_node(
                "Gather", [weight("table", words, width, scale=1), "ids"], ["x0"], name="look_up"
            )
        ]
        for k in range(blocks):
            nodes += _block(
                k,
                weight(f"up{k}", width, width, scale=1.4 / width**0.5),
                weight(f"down{k}", width, width, scale=0.3 / width**0.5),
            )
        nodes.append(
            helper.make_node(
                "MatMul",
                [f"x{blocks}", weight("head", width, 32, scale=width**-0.5)],
                ["y"],
                name="head_product",
            )
        )
    inputs = [helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", 16])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 16, 32])]
    graph = helper.make_graph(nodes, "large", inputs, outputs, weights)
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


def _block(k: int, up: str, down: str) -> list[NodeProto]:
    return [
        helper.make_node("MatMul", [f"x{k}", up], [f"h{k}"], name=f"up_{k}"),
        helper.make_node("Relu", [f"h{k}"], [f"r{k}"], name=f"relu_{k}"),
        helper.make_node("MatMul", [f"r{k}", down], [f"d{k}"], name=f"down_{k}"),
        helper.make_node("Add", [f"x{k}", f"d{k}"], [f"x{k + 1}"], name=f"add_{k}"),
    ]
