"""Models that are quantized already."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from graphs import images, normal, parse, silent, small_convnet
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from onnx import ModelProto, helper, numpy_helper

import eptq_onnx
from eptq_onnx import Config, ModelError
from eptq_onnx.graph import io
from eptq_onnx.graph.unquantize import unquantized
from eptq_onnx.runtime import Session

FAST: dict[str, Any] = {
    "preset": "fast",
    "target": "ort-x64-vnni",
    "objective": "integers",
    "measure_speed": False,
}


def values(model: ModelProto) -> dict[str, np.ndarray[Any, Any]]:
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def kinds(model: ModelProto) -> set[str]:
    return {n.op_type for n in model.graph.node}


def snr(found: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any]) -> float:
    return float(10 * np.log10(np.var(wanted) / max(np.mean(np.square(found - wanted)), 1e-30)))


def quantized(model: ModelProto, data: Any, **options: Any) -> eptq_onnx.Result:
    return eptq_onnx.quantize(model, data, Config(**{**FAST, **options}), progress=silent)


def weights_of(model: ModelProto) -> dict[str, tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    """Integers and scales of the weights of layers, in the order of these."""
    constants, makers = values(model), {o: n for n in model.graph.node for o in n.output}
    found = {}
    for node in model.graph.node:
        maker = makers.get(node.input[1]) if node.op_type in ("Conv", "Gemm", "MatMul") else None
        if maker is not None and maker.op_type == "DequantizeLinear" and maker.input[0] in constants:
            integers = constants[maker.input[0]].astype(np.int64)
            zero = constants[maker.input[2]].astype(np.int64) if len(maker.input) > 2 else np.int64(0)
            axis = next((a.i for a in maker.attribute if a.name == "axis"), 1)
            if np.size(zero) > 1:
                zero = zero.reshape([-1 if k == axis else 1 for k in range(integers.ndim)])
            found[node.output[0]] = integers - zero, constants[maker.input[1]].reshape(-1)
    return found


def ranges_of(model: ModelProto) -> dict[str, tuple[float, float]]:
    """Range of each quantized activation."""
    constants = values(model)
    found = {}
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear" and node.input[0] not in constants:
            zero, scale = constants[node.input[2]], float(constants[node.input[1]])
            low = np.iinfo(zero.dtype).min - int(zero)
            found[node.input[0].removesuffix("_float")] = low * scale, (low + 255) * scale
    return found


# ---- files of onnxruntime ----------------------------------------------------------------------------------
def static(
    tmp_path: Path, model: ModelProto, data: dict[str, np.ndarray[Any, Any]], **options: Any
) -> ModelProto:
    quantization: Any = pytest.importorskip("onnxruntime.quantization")

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            count = len(next(iter(data.values())))
            self._feeds = iter([{n: v[k : k + 1] for n, v in data.items()} for k in range(count)])

        def get_next(self) -> Any:
            return next(self._feeds, None)

    path, given = tmp_path / "q.onnx", tmp_path / "float.onnx"
    onnx.save(model, given)
    options = {k: getattr(quantization.QuantType, v) if k.endswith("type") else v for k, v in options.items()}
    quantization.quantize_static(given, path, Reader(), **options)
    return onnx.load(path)


NET = """
g (float[N,3,8,8] x) => (float[N,10] y) {
    c = Conv <pads = [1, 1, 1, 1]> (x, k1, b1)
    r = Relu (c)
    d = Conv <pads = [1, 1, 1, 1]> (r, k2, b2)
    s = Add (d, r)
    p = GlobalAveragePool (s)
    f = Flatten (p)
    y = Gemm <transB = 1> (f, w, b)
}
"""


def net() -> ModelProto:
    model = parse(NET, {
        "k1": normal(8, 3, 3, 3, seed=1, scale=0.3), "b1": normal(8, seed=2, scale=0.3),
        "k2": normal(8, 8, 3, 3, seed=3, scale=0.2), "b2": normal(8, seed=4, scale=0.3),
        "w": normal(10, 8, seed=5), "b": normal(10, seed=6),
    })  # fmt: skip
    model.ir_version = 8
    return model


DATA = {"x": normal(24, 3, 8, 8, seed=9, scale=1.0)}


@pytest.mark.once
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("kind", ["QUInt8", "QInt8"])
def test_scales_and_integers_of_a_static_file_are_kept(tmp_path, per_channel, kind):
    given = static(tmp_path, net(), DATA, per_channel=per_channel, activation_type=kind, weight_type="QInt8")
    result = quantized(given, DATA)
    theirs, ours = weights_of(given), weights_of(result.model)
    assert len(ours) == 3
    for (one, scale), (other, own) in zip(theirs.values(), ours.values(), strict=True):
        np.testing.assert_array_equal(one, other)
        np.testing.assert_allclose(np.broadcast_to(scale, own.shape), own, rtol=1e-6)
    before, after = ranges_of(given), ranges_of(result.model)
    assert after
    for name, reach in after.items():
        # The quantizer behind the first convolution is all that is left of its Relu.
        np.testing.assert_allclose(reach, before[name.removesuffix("/clip")], rtol=1e-5, atol=1e-6)
    assert "r/clip" in after
    [note] = [n for n in result.report.notes if "quantized already" in n]
    assert "weights that keep their integers, as the file has no others: 3" in note
    # The network is the one that was given, to the rounding of a few values.
    x = {"x": DATA["x"][:1]}
    assert snr(Session(result.model).run(x)["y"], Session(given).run(x)["y"]) > 30


@pytest.mark.once
def test_a_static_file_is_quantized_anew_where_that_is_asked_for(tmp_path):
    given = static(tmp_path, net(), DATA, per_channel=False)
    result = quantized(given, DATA, requantize=True)
    assert {scale.size for _, scale in weights_of(result.model).values()} == {8, 10}
    assert any("gets new ranges and scales" in n for n in result.report.notes)


@pytest.mark.once
def test_fewer_bits_than_the_file_has_are_new_ones(tmp_path):
    result = quantized(static(tmp_path, net(), DATA), DATA, weight_bits=4, edge_bits=4, storage="int8")
    assert {layer.weight_bits for layer in result.report.layers} == {4}


@pytest.mark.once
@pytest.mark.parametrize("per_channel", [False, True])
def test_a_dynamic_file_stays_dynamic(tmp_path, per_channel):
    quantization: Any = pytest.importorskip("onnxruntime.quantization")
    model = parse(
        "g (float[N,5,64] x) => (float[N,5,32] y) { h = MatMul (x, w1)  b = Add (h, b1)  r = Relu (b)  y = MatMul (r, w2) }",
        {
            "w1": normal(64, 96, seed=1, scale=0.2),
            "b1": normal(96, seed=3),
            "w2": normal(96, 32, seed=2, scale=0.2),
        },
    )
    model.ir_version = 8
    onnx.save(model, tmp_path / "float.onnx")
    quantization.quantize_dynamic(tmp_path / "float.onnx", tmp_path / "d.onnx", per_channel=per_channel)
    data = {"x": normal(24, 5, 64, seed=8)}
    result = quantized(onnx.load(tmp_path / "d.onnx"), data)
    assert {layer.op_type for layer in result.report.layers} == {"MatMul"}
    assert sum(n.op_type == "MatMulInteger" for n in result.model.graph.node) == 2
    theirs = [
        v for n, v in values(onnx.load(tmp_path / "d.onnx")).items() if v.dtype == np.int8 and v.ndim == 2
    ]
    ours = [v for n, v in values(result.model).items() if v.dtype == np.int8 and v.ndim == 2]
    for one, other in zip(theirs, ours, strict=True):
        np.testing.assert_array_equal(one, other)
    assert any("ranges of their inputs in every run: 2" in n for n in result.report.notes)
    x = {"x": data["x"][:1]}
    wanted = Session(tmp_path / "d.onnx").run(x)["y"]
    assert snr(Session(result.model).run(x)["y"], wanted) > 40
    # Without data, too.
    blind = eptq_onnx.quantize(
        tmp_path / "d.onnx", config=Config(activations="dynamic", target="ort-x64-vnni")
    )
    assert snr(Session(blind.model).run(x)["y"], wanted) > 40


@pytest.mark.once
@pytest.mark.parametrize("options", [
    {"weight_type": "QUInt8"}, {"weight_type": "QInt8"}, {"per_channel": True}, {"op_types_to_quantize": ["Conv"]},
])  # fmt: skip
def test_variants_of_dynamic_files_are_read(tmp_path, options):
    """Tables that products read as integers, convolutions, zero points of weights."""
    quantization: Any = pytest.importorskip("onnxruntime.quantization")
    convolution = "op_types_to_quantize" in options
    if convolution:
        model, data, options = net(), DATA, {"weight_type": "QUInt8"}
    else:
        model = parse(
            "g (int64[N,6] ids) => (float[N,6,32] y) { e = Gather (words, ids)  h = MatMul (e, w1)  r = Relu (h) "
            "y = MatMul (r, w2) }",
            {"words": normal(400, 64, seed=1), "w1": normal(64, 96, seed=2), "w2": normal(96, 32, seed=3)},
        )
        model.ir_version, data = 8, {"ids": np.random.default_rng(1).integers(0, 400, (24, 6))}
    options = {k: getattr(quantization.QuantType, v) if k == "weight_type" else v for k, v in options.items()}
    onnx.save(model, tmp_path / "float.onnx")
    quantization.quantize_dynamic(tmp_path / "float.onnx", tmp_path / "d.onnx", **options)
    result = quantized(onnx.load(tmp_path / "d.onnx"), data)
    one = {n: v[:1] for n, v in data.items()}
    wanted = Session(tmp_path / "d.onnx").run(one)["y"]
    assert snr(Session(io.load(tmp_path / "d.onnx")).run(one)["y"], wanted) > 30
    assert snr(Session(result.model).run(one)["y"], wanted) > 30
    assert len(result.report.layers) == (3 if convolution else 2)


# ---- quantization-aware training ---------------------------------------------------------------------------
def pair(model: ModelProto, tensor: str, scale: Any, zero: Any, axis: int | None = None) -> None:
    """Put a quantizer and its inverse between a tensor and its readers."""
    for node in model.graph.node:
        node.input[:] = [f"{tensor}_dq" if i == tensor else i for i in node.input]
    model.graph.initializer.extend(
        [
            numpy_helper.from_array(np.asarray(scale, np.float32), f"{tensor}_scale"),
            numpy_helper.from_array(np.asarray(zero), f"{tensor}_zero"),
        ]
    )
    more: dict[str, Any] = {} if axis is None else {"axis": axis}
    ends = [f"{tensor}_scale", f"{tensor}_zero"]
    nodes = [
        helper.make_node("QuantizeLinear", [tensor, *ends], [f"{tensor}_q"], name=f"{tensor}/q", **more),
        helper.make_node(
            "DequantizeLinear", [f"{tensor}_q", *ends], [f"{tensor}_dq"], name=f"{tensor}/dq", **more
        ),
    ]
    place = next((k + 1 for k, n in enumerate(model.graph.node) if tensor in n.output), 0)
    before = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*before[:place], *nodes, *before[place:]])


def trained(opset: int = 13, per_channel: bool = True, dtype: Any = np.int8, levels: int = 127) -> ModelProto:
    """A network as it is exported behind quantization-aware training."""
    model = net()
    for name in ("k1", "k2", "w"):
        weight = values(model)[name]
        reach = np.abs(weight).max(axis=tuple(range(1, weight.ndim))) if per_channel else np.abs(weight).max()
        scale = np.asarray(reach, np.float32) / np.float32(levels)
        pair(model, name, scale, np.zeros(np.shape(scale), np.int8), 0 if per_channel else None)
    middle = dtype(128) if dtype is np.uint8 else dtype(0)
    for name, step in (("x", 0.03), ("r", 0.06), ("s", 0.12)):
        pair(model, name, step, middle)
    model.opset_import[0].version = opset
    return model


@pytest.mark.parametrize("opset", [13, 17, 21])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
def test_float_weights_of_a_trained_file_are_rounded_on_its_scales(opset, per_channel, dtype):
    given = trained(opset, per_channel, dtype)
    float_form, found = unquantized(given, "m")
    assert not kinds(float_form) & {"QuantizeLinear", "DequantizeLinear"}
    assert {n: s.exact for n, s in found.scales.items()} == {"k1": False, "k2": False, "w": False}
    np.testing.assert_array_equal(Session(float_form).run(DATA)["y"], Session(net()).run(DATA)["y"])
    if opset == 17:
        return
    result = quantized(given, DATA)
    for (integers, scale), name in zip(weights_of(result.model).values(), ("k1", "k2", "w"), strict=True):
        wanted = values(given)[f"{name}_scale"]
        np.testing.assert_allclose(scale, np.broadcast_to(wanted, scale.shape), rtol=1e-6)
        shape = (-1, *(1,) * (integers.ndim - 1))
        nearest = np.clip(np.rint(values(given)[name] / np.reshape(scale, shape)), -127, 127)
        assert np.abs(integers - nearest).max() <= 2
    assert any("rounded anew from their float values: 3" in n for n in result.report.notes)
    ranges = ranges_of(result.model)
    assert ranges["x"] == pytest.approx((-128 * 0.03, 127 * 0.03), rel=1e-5)
    # Ours has noise of two tensors more, which are float in the file.
    exact = Session(net()).run(DATA)["y"]
    ours, theirs = (snr(Session(m).run(DATA)["y"], exact) for m in (result.model, given))
    assert ours > theirs - 2


def test_rounding_of_a_trained_file_gets_better():
    given, data = trained(levels=7), {"x": normal(64, 3, 8, 8, seed=9, scale=1.0)}
    result = quantized(given, data)
    for (_, scale), name in zip(weights_of(result.model).values(), ("k1", "k2", "w"), strict=True):
        np.testing.assert_allclose(scale, values(given)[f"{name}_scale"], rtol=1e-6)
    exact = Session(net()).run(DATA)["y"]
    ours, theirs = (snr(Session(m).run(DATA)["y"], exact) for m in (result.model, given))
    assert ours > theirs + 2


def test_integers_are_not_optimized_and_trained_scales_are_not_either():
    data = {"x": normal(64, 3, 8, 8, seed=9, scale=1.0)}
    options = {"preset": "balanced", "steps": 3, "patience": 0, "max_noise": 0}
    first = quantized(trained(levels=7), data, **options)
    assert first.report.optimization is not None
    assert first.report.optimization.steps == 3
    for (_, scale), name in zip(weights_of(first.model).values(), ("k1", "k2", "w"), strict=True):
        np.testing.assert_allclose(scale, values(trained(levels=7))[f"{name}_scale"], rtol=1e-6)
    again = quantized(first.model, data, **options)
    for (one, _), (other, _) in zip(
        weights_of(first.model).values(), weights_of(again.model).values(), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_a_score_is_kept_and_a_model_is_looked_at():
    given = trained(levels=7)
    exact = Session(net()).run(DATA)["y"]

    def score(model: Any) -> float:
        return snr(model.run(["y"], DATA)[0], exact)

    config = Config(**FAST)
    result = eptq_onnx.quantize(given, DATA, config, progress=silent, evaluate=score, max_drop=300)
    assert result.report.trail is not None
    assert result.report.trail.float_score > 100
    assert {o.operator: o.integer for o in eptq_onnx.inspect(given, config).operators}["Conv"] == 2
    assert eptq_onnx.sensitivity(given, DATA, config, progress=silent).parts


def test_a_turned_weight_keeps_its_scales():
    model = parse(
        "g (float[N,16] x) => (float[N,8] y) { t = Transpose <perm = [1, 0]> (w)  y = MatMul (x, t) }",
        {"w": normal(8, 16, seed=1)},
    )
    scale = np.abs(values(model)["w"]).max(axis=1) / np.float32(127)
    pair(model, "w", scale, np.zeros(8, np.int8), 0)
    [scales] = [s for n, s in unquantized(model, "m")[1].scales.items() if n == "t"]
    assert (scales.axis, len(scales.values)) == (1, 8)
    result = quantized(model, {"x": normal(24, 16)}, activations="static")
    [(_, own)] = weights_of(result.model).values()
    np.testing.assert_allclose(own, scale, rtol=1e-6)


@pytest.mark.parametrize("kind", ["float", "float16"])
def test_a_function_that_a_tool_has_removed_is_there_again(kind):
    dtype = np.dtype("float32" if kind == "float" else kind).type
    model = parse(
        f"g ({kind}[4,8] x) => ({kind}[4,5] y) {{ h = MatMul (x, w)  q = QuantizeLinear (h, s, z) "
        "d = DequantizeLinear (q, s, z)  y = MatMul (d, v) }",
        {
            "w": normal(8, 6).astype(dtype),
            "v": normal(6, 5, seed=1).astype(dtype),
            "s": dtype(0.01),
            "z": np.uint8(0),
        },
    )
    model.opset_import[0].version = 19
    found = unquantized(model, "m")[0]
    assert kinds(found) == {"MatMul", "Clip" if kind == "float" else "Relu"}
    x = {"x": normal(4, 8, seed=2).astype(dtype)}
    assert snr(Session(found).run(x)["y"].astype(float), Session(model).run(x)["y"].astype(float)) > 30


MOVES = {
    "": "m = Identity (q)",
    "turned": "m = Transpose <perm = [0, 2, 1]> (q)",
    "shaped": "m = Reshape (q, shape)",
    "cut": "m = Slice (q, zero, five, two)",
    "joined": "m = Concat <axis = 1> (q, q)",
    "clipped": "m = Clip (q, low, high)",
}


@settings(max_examples=60, deadline=None)
@drawn(
    move=st.sampled_from(sorted(MOVES)),
    dtype=st.sampled_from([np.int8, np.uint8]),
    opset=st.integers(13, 21),
    zero=st.integers(-100, 100),
    weight=st.sampled_from(["float", "integers", "pair", "none"]),
    axis=st.sampled_from([None, 0, 1]),
    seed=st.integers(0, 99),
)
def test_what_is_on_the_grid_is_computed_alike(move, dtype, opset, zero, weight, axis, seed):
    rng = np.random.default_rng(seed)
    point = dtype(zero + (128 if dtype is np.uint8 else 0))
    inner = {"turned": 6, "shaped": 12, "cut": 5}.get(move, 8)
    step = np.float32(2.0**-5)
    limits = np.iinfo(dtype)
    integers = rng.integers(limits.min, limits.max + 1, (2, 6, 8))
    if move == "clipped":
        integers = np.clip(integers, point - 5 if point > limits.min + 5 else limits.min, limits.max - 3)
    values_of_w = rng.integers(-127, 128, (inner, 4))
    scales = np.exp2(rng.integers(-9, -6, 1 if axis is None else values_of_w.shape[axis])).astype(np.float32)
    along = np.reshape(scales, (-1, 1) if axis == 0 else (1, -1) if axis == 1 else ())
    w = (values_of_w * along).astype(np.float32)
    by = "" if axis is None else f"<axis = {axis}> "
    product = {
        "float": "y = MatMul (d, w)",
        "integers": f"v = DequantizeLinear {by}(wi, ws, wz)  y = MatMul (d, v)",
        "pair": f"u = QuantizeLinear {by}(w, ws, wz)  v = DequantizeLinear {by}(u, ws, wz)  y = MatMul (d, v)",
        "none": "y = Relu (d)",
    }[weight]
    text = f"q = QuantizeLinear (x, s, z)  {MOVES[move]}  d = DequantizeLinear (m, s, z)  {product}"
    model = parse(f"g (float[2,6,8] x) => (float y) {{ {text} }}", {
        "s": step, "z": point, "w": w, "wi": values_of_w.astype(np.int8),
        "ws": scales if axis is not None else scales[0],
        "wz": np.zeros(len(scales), np.int8) if axis is not None else np.int8(0),
        "shape": np.array([2, 4, 12]), "zero": np.array([0]), "five": np.array([5]), "two": np.array([2]),
        "low": dtype(integers.min()), "high": dtype(integers.max()),
    })  # fmt: skip
    model.opset_import[0].version = opset
    float_form, found = unquantized(model, "m")
    assert not kinds(float_form) & {"QuantizeLinear", "DequantizeLinear"}
    x = {"x": ((integers - int(point)) * step).astype(np.float32)}
    ours, theirs = (Session(m, integers=False).run(x)["y"] for m in (float_form, model))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    low, high = (integers.min(), integers.max()) if move == "clipped" else (limits.min, limits.max)
    [(_, reach)] = {
        name: r for name, r in found.ranges.items() if name != "x"
    }.items() or found.ranges.items()
    if low <= point <= high:
        assert reach == pytest.approx(((low - int(point)) * step, (high - int(point)) * step))
    if weight in ("integers", "pair"):
        [scale] = found.scales.values()
        assert (scale.exact, scale.axis, len(scale.values)) == (weight == "integers", axis, len(scales))


# ---- own files ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("bits", "storage"),
    [((8, 8), "int8"), ((4, 8), "int8"), ((4, 8), "packed"), ((4, 8), "native"), ((8, 4), "int8")],
)
def test_a_file_of_this_package_is_taken_again(bits, storage):
    options = {"weight_bits": bits[0], "edge_bits": bits[0], "activation_bits": bits[1]}
    if storage == "native":
        options["target"] = "qnn"
    data = {"image": images(24)}
    first = quantized(small_convnet("1"), data, storage=storage, **options)
    again = quantized(first.model, data, storage=storage, **options)
    x = {"image": images(1, seed=5)}
    one, other = (Session(r.model).run(x)["logits"] for r in (first, again))
    assert snr(other, one) > 25


def test_own_dynamic_files_with_packed_weights_keep_their_integers():
    model = parse(
        "g (float[N,5,64] x) => (float[N,5,64] y) { h = MatMul (x, w1)  r = Relu (h)  y = MatMul (r, w2) }",
        {"w1": normal(64, 96, seed=1, scale=0.2), "w2": normal(96, 64, seed=2, scale=0.2)},
    )
    data, four = {"x": normal(24, 5, 64, seed=8)}, {"weight_bits": 4, "edge_bits": 4}
    first = quantized(model, data, activations="dynamic", storage="packed", **four)
    again = quantized(first.model, data)
    # Zero points are part of the integers: they need a bit more.
    assert {layer.weight_bits for layer in again.report.layers} <= {4, 5}
    one, other = (Session(r.model).run({"x": data["x"][:1]})["y"] for r in (first, again))
    assert snr(other, one) > 60


@pytest.mark.parametrize(("bits", "block"), [(4, 32), (4, 16), (4, 64)])
def test_weights_in_blocks_stay_or_are_quantized_anew(bits, block):
    model = parse(
        "g (float[N,5,70] x) => (float[N,5,64] y) { h = MatMul (x, w1)  r = Relu (h)  y = MatMul (r, w2) }",
        {"w1": normal(70, 96, seed=1, scale=0.2), "w2": normal(96, 64, seed=2, scale=0.2)},
    )
    data = {"x": normal(24, 5, 70, seed=8)}
    wide = {"weight_bits": bits, "edge_bits": bits, "activation_bits": 32}
    first = quantized(model, data, block=block, storage="matmulnbits", **wide)
    assert "MatMulNBits" in kinds(first.model)
    with pytest.raises(ModelError, match="the option requantize quantizes it anew"):
        quantized(first.model, data)
    _, plain, found = io.load_with_quantization(first.model, blocks=True)
    assert found.other_weights == sum(n.op_type == "MatMulNBits" for n in first.model.graph.node)
    x = {"x": data["x"][:1]}
    one, other = (Session(m, optimize=False).run(x)["y"] for m in (plain, first.model))
    assert snr(one, other) > 35  # MatMulNBits rounds activations block by block
    again = quantized(first.model, data, requantize=True, activations="dynamic")
    assert sum(n.op_type == "MatMulInteger" for n in again.model.graph.node) == 2


# ---- what is not read --------------------------------------------------------------------------------------
@pytest.mark.parametrize(("text", "constants", "what"), [
    ("q = QuantizeLinear (x, s, z)  y = Identity (q)", {}, "its output"),
    ("q = QuantizeLinear (x, s, z)  d = DequantizeLinear (q, s2, z)  y = Relu (d)", {}, "another scale"),
    ("m = ReduceMax <keepdims = 0> (x)  q = QuantizeLinear (x, m, z)  y = DequantizeLinear (q, m, z)", {},
     "computes its scale at run time"),
    ("q = QuantizeLinear (x, s, z)  c = Cast <to = 1> (q)  y = Relu (c)", {}, "computes on the integers"),
    ("q, a, b = DynamicQuantizeLinear (x)  y = Mul (x, a)", {}, "computes on the integers"),
    ("q, a, b = DynamicQuantizeLinear (x)  f = Mul (a, s)  y = Add (x, f)", {}, "computes on the integers"),
])  # fmt: skip
def test_what_is_not_read_is_told(text, constants, what):
    kind = "uint8" if "Identity" in text else "float"
    model = parse(f"g (float[4,8] x) => ({kind}[4,8] y) {{ {text} }}", {
        "s": np.float32(0.1), "s2": np.float32(0.2), "z": np.uint8(0), **constants,
    })  # fmt: skip
    with pytest.raises(ModelError, match=what):
        io.load(model)


def test_files_in_operators_on_integers_are_told():
    model = parse(
        "g (uint8[4,8] x) => (uint8[4,4] y) { y = QLinearMatMul (x, s, z, w, s, z, s, z) }",
        {"s": np.float32(0.1), "z": np.uint8(0), "w": np.ones((8, 4), np.uint8)},
    )
    with pytest.raises(ModelError, match="QLinearMatMul, which computes on integers as a whole"):
        io.load(model)
