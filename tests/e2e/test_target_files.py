"""Target files of one's own: the one that the documentation shows, and drawn ones."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import MODELS
from graphs import images, normal, parse, silent, small_convnet
from obeyed import obeyed
from onnx import ModelProto, TensorProto, helper, numpy_helper

import eptq_onnx
from eptq_onnx import Config, targets
from eptq_onnx.graph.view import GraphView
from eptq_onnx.method.normalize import normalize
from eptq_onnx.numerics import quant_math
from eptq_onnx.ops.regions import regions
from eptq_onnx.runtime import Session
from eptq_onnx.targets import Target

PAGE = MODELS.parent / "docs" / "targets.md"
pytestmark = pytest.mark.once

BLOCK = re.compile(r"Save it\s+as\s+`(.+?)`:\n\n```toml\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def sqnr(exact: np.ndarray, got: np.ndarray) -> float:
    return quant_math.sqnr_db(float(np.square(exact).sum()), float(np.square(exact - got).sum()))


@pytest.fixture
def example(tmp_path: Path) -> str:
    """The file that the page shows, as a reader saves it."""
    [(name, text)] = BLOCK.findall(PAGE.read_text(encoding="utf-8"))
    (tmp_path / name).write_text(text, encoding="utf-8")
    return str(tmp_path / name)


@pytest.mark.parametrize(
    ("options", "least"),
    [
        ({"weight_bits": 8, "preset": "fast"}, 31),
        ({"weight_bits": 4, "preset": "fast"}, 22),
        ({"weight_bits": 8, "steps": 20}, 31),
        ({"weight_bits": 4, "steps": 20}, 22),
        ({"weight_bits": 4, "activation_bits": 4, "edge_bits": 4, "steps": 20}, 8),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_the_target_that_the_page_shows_works(example, options, least):
    target = targets.load(example)
    with np.load(MODELS / "digits_calib.npz") as file:
        samples = {name: file[name][:128] for name in file.files}
    with np.load(MODELS / "digits_eval.npz") as file:
        unseen = file[file.files[0]][:128]
    model = MODELS / "digits_resnet.onnx"
    result = eptq_onnx.quantize(model, samples, Config(target=example, score_samples=128, **options))
    counts = obeyed(result.model, target)
    assert counts["weight"] == len(result.report.layers)
    assert counts["bias"] == 0
    assert counts["float bias"] == counts["weight"]
    written, exact = Session(result.model), Session(onnx.load(model))
    feeds = {exact.inputs[0]: unseen}
    expected, got = exact.run(feeds)[exact.outputs[0]], written.run(feeds)[exact.outputs[0]]
    assert sqnr(expected, got) > least
    assert np.mean(expected.argmax(axis=1) == got.argmax(axis=1)) > 0.9


def drawn_target(rng: np.random.Generator, folder: Path, *, floats: bool = False) -> Target:
    """A target of any lines, by its file."""
    signed = bool(rng.integers(2))
    low, high = int(rng.choice([-128, -127, -64, -31, -8])), int(rng.choice([127, 63, 31, 7]))
    said: dict[str, dict[str, Any]] = {
        "weight": {
            "per_channel": bool(rng.integers(2)),
            "range_8_bits": [low, high],
            "depthwise_range_8_bits": [-127, 127] if rng.integers(2) else [low, high],
            "scale": str(rng.choice(["any", "power of two"])),
        },
        "activation": {
            "container": "int8" if signed else "uint8",
            "symmetric": signed and bool(rng.integers(2)),
            "scale": str(rng.choice(["any", "power of two"])),
        },
        "bias": {"integer": bool(rng.integers(2))},
    }
    if floats:
        for table in ("weight", "activation"):
            said[table]["container"] = str(rng.choice(["float8e4m3fn", "float8e5m2"]))
        said["activation"]["symmetric"], said["bias"]["integer"] = True, False
    lines = ['name = "drawn"', 'title = "Drawn"', 'extends = "ort-x64"']
    for table, fields in said.items():
        lines.append(f"[{table}]")
        lines += [f"{name} = {_toml(value)}" for name, value in fields.items()]
    (folder / "drawn.toml").write_text("\n".join(lines))
    target = targets.load(str(folder / "drawn.toml"))
    assert target.weight.range_8_bits == (low, high)
    assert (target.activation.symmetric, target.bias.integer) == (
        said["activation"]["symmetric"],
        said["bias"]["integer"],
    )
    return target


def _toml(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value).lower()


def drawn_network(rng: np.random.Generator) -> ModelProto:
    """Convolutions (also depthwise), activation functions, sums, products with constants, joins and pools,
    and a last layer."""
    constants: list[TensorProto] = []
    nodes: list[onnx.NodeProto] = []

    def constant(value: np.ndarray | np.generic) -> str:
        constants.append(numpy_helper.from_array(np.asarray(value), f"c{len(constants)}"))
        return constants[-1].name

    def node(op_type: str, *inputs: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(op_type, list(inputs), [f"t{len(nodes)}"], **attributes))
        return nodes[-1].output[0]

    def conv(x: str, read: int, groups: int = 1) -> str:
        weight = rng.normal(0, 1 / np.sqrt(9 * read / groups), (8, read // groups, 3, 3)) * np.exp2(
            rng.uniform(-3, 3, (8, 1, 1, 1))
        )
        # A channel of zeros, one that is tiny, and one that leans to one side.
        weight[0], weight[1], weight[2] = 0, weight[1] * 1e-20, np.abs(weight[2])
        bias = (
            [constant(rng.normal(0, 10.0 ** rng.integers(-2, 2), 8).astype(np.float32))]
            if rng.integers(3)
            else []
        )
        return node("Conv", x, constant(weight.astype(np.float32)), *bias, pads=[1, 1, 1, 1], group=groups)

    x = conv("x", 3)
    for _ in range(3):
        kind = rng.integers(9)
        if kind == 0:
            x = node("Relu", x)
        elif kind == 1:
            x = node("Clip", x, constant(np.float32(0)), constant(np.float32(3)))
        elif kind == 2:
            x = node("Clip", x, constant(np.float32(-1)), constant(np.float32(1.7)))
        elif kind == 3:
            x = node("Mul", x, constant(np.float32(rng.uniform(-2, 2, (1, 8, 1, 1)))))
        elif kind == 4:
            x = node("Add", x, constant(np.zeros((1, 8, 1, 1), np.float32)))
        elif kind == 5:
            x = node("MaxPool", x, kernel_shape=[3, 3], pads=[1, 1, 1, 1])
        elif kind == 6:
            x = node("Sigmoid", x)
        elif kind == 7:
            x = node("Mul", x, node("Sigmoid", x))
        shortcut, x = x, conv(x, 8, int(rng.choice([1, 8])))
        join = rng.integers(3)
        if join == 0:
            x = node("Add", x, shortcut)
        elif join == 1:
            x = conv(node("Concat", x, shortcut, axis=1), 16)
    x = node("Flatten", node("GlobalAveragePool", node("Relu", x)))
    last = (
        constant(rng.normal(0, 0.4, (5, 8)).astype(np.float32)),
        constant(rng.normal(0, 0.2, 5).astype(np.float32)),
    )
    nodes.append(helper.make_node("Gemm", [x, *last], ["y"], transB=1))
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 8, 8])
    made = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 5])
    graph = helper.make_graph(nodes, "drawn", [given], [made], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("seed", range(4))
def test_what_is_written_obeys_a_drawn_target_of_floats(seed, tmp_path):
    rng = np.random.default_rng([seed, 8])
    target, model = drawn_target(rng, tmp_path, floats=True), drawn_network(rng)
    rounding = ["soft", "straight-through"][seed % 2]
    options: dict[str, Any] = {"preset": "fast"} if seed > 1 else {"steps": 4, "batch_size": 4}
    config = Config(target=str(tmp_path / "drawn.toml"), rounding=rounding, max_noise=0, **options)
    result = eptq_onnx.quantize(model, images(24), config)
    counts = obeyed(result.model, target)
    assert counts["weight"] == len(result.report.layers) > 0
    assert counts["bias"] == 0
    expected, got = (
        Session(m, integers=False).run({"x": images(16, seed=1)})["y"] for m in (model, result.model)
    )
    assert sqnr(expected, got) > (6 if target.weight.container == "float8e5m2" else 10)


@pytest.mark.parametrize("seed", range(12))
def test_what_is_written_obeys_every_line_of_a_drawn_target(seed, tmp_path):
    rng = np.random.default_rng([seed, 7])
    target, model = drawn_target(rng, tmp_path), drawn_network(rng)
    bits = int(rng.choice([2, 3, 4, 5, 6, 7, 8])), int(rng.choice([4, 6, 8, 8, 16]))
    options: dict[str, Any] = {"preset": "fast"} if rng.integers(2) else {"steps": 6, "batch_size": 4}
    if not rng.integers(4):
        options["budget"] = "weights=5"
    if not rng.integers(4):
        options["weight_range"] = "minmax"
    config = Config(
        target=str(tmp_path / "drawn.toml"), weight_bits=bits[0], activation_bits=bits[1], **options
    )
    result = eptq_onnx.quantize(model, images(40), config)
    counts = obeyed(result.model, target, activation_bits=bits[1])
    assert counts["weight"] == len(result.report.layers)
    assert counts["activation"]
    assert (counts["bias"] > 0) == target.bias.integer
    assert (counts["float bias"] > 0) != target.bias.integer
    expected, got = (Session(m).run({"x": images(16, seed=1)})["y"] for m in (model, result.model))
    assert np.isfinite(got).all()
    if (
        min(bits) >= 6
        and "budget" not in options
        and target.weight.per_channel
        and target.weight.range_8_bits[1] > 60
    ):
        assert sqnr(expected, got) > 12


SHIPPED = {name: targets.load(name) for name in targets.names()}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", SHIPPED)
def test_what_is_written_obeys_a_shipped_target(name, seed):
    rng = np.random.default_rng([seed, 28])
    target, model = SHIPPED[name], drawn_network(rng)
    bits = 8 - seed if target.activation.narrow else 8
    options = {"preset": "fast"} if seed else {"steps": 4, "batch_size": 4}
    result = eptq_onnx.quantize(
        model, images(24), Config(target=name, max_noise=0, activation_bits=bits, **options)
    )
    counts = obeyed(result.model, target)
    assert counts["weight"] == len(result.report.layers) > 0
    assert (counts["bias"] > 0) == target.bias.integer
    kept = regions(GraphView(normalize(model, 13)), target.patterns.keep)
    assert counts["whole"] == len(kept)
    expected, got = (Session(m).run({"x": images(16, seed=1)})["y"] for m in (model, result.model))
    # One scale for all channels, which differ by a factor of up to 64, costs most of the bits.
    assert sqnr(expected, got) > ((8 if seed else 12) if target.weight.per_channel else 4)


@pytest.mark.parametrize(
    ("broken", "target"),
    [
        (("ort-x64", {}), "ort-web"),
        (("ort-x64", {}), "tensorrt"),
        (("portable", {"operators": {"Concat": {"runs": "arithmetic"}}}), "tensorrt"),
        (("portable", {"operators": {"Add": {"runs": "arithmetic"}}}), "tensorrt"),
        (("openvino", {"patterns": {"keep": []}}), "openvino"),
        (("tensorrt", {"outputs": "shared"}), "tensorrt"),
        (("tensorrt", {"operators": {"Conv": {"output": "quantized"}}}), "tensorrt"),
        (("openvino", {"operators": {"Concat": {"shared_scale": False}}}), "openvino"),
    ],
)
def test_a_file_for_another_target_does_not_obey(tmp_path, broken, target):
    base, lines = broken
    (tmp_path / "other.toml").write_text(f'name = "o"\ntitle = "O"\nextends = "{base}"\n{_lines(lines)}')
    config = Config(target=str(tmp_path / "other.toml"), preset="fast", max_noise=0)
    model = eptq_onnx.quantize(_all_rules(), images(16), config).model
    with pytest.raises(AssertionError):
        assert obeyed(model, targets.load(target))["whole"] == 2 * (target == "openvino")
    right = eptq_onnx.quantize(
        _all_rules(), images(16), Config(target=target, preset="fast", max_noise=0)
    ).model
    counts = obeyed(right, targets.load(target))
    assert counts["whole"] == 2 * (target == "openvino")
    if target in ("tensorrt", "openvino"):
        assert counts["shared"] == 1
    if target == "tensorrt":
        assert counts["residual"] == 1


def _lines(fields: dict[str, object], above: str = "") -> str:
    """Fields of nested tables as lines of a TOML file."""
    return "".join(
        _lines(value, f"{above}{name}.") if isinstance(value, dict) else f"{above}{name} = {_toml(value)}\n"
        for name, value in fields.items()
    )


def _all_rules() -> ModelProto:
    """A network with a residual sum, a Concat, SiLU, and an output that a layer reads."""
    weights = {
        n: normal(8, 3 if n == "w1" else 16 if n == "w4" else 8, 3, 3, seed=int(n[1])) for n in WEIGHTS
    }
    text = """
        g (float[N,3,8,8] x) => (float[N,8,8,8] c, float[N,8,8,8] y) {
            a = Conv <pads = [1,1,1,1]> (x, w1, b)  r = Relu (a)  d = Conv <pads = [1,1,1,1]> (r, w2)
            s = Add (d, r)  c = Conv <pads = [1,1,1,1]> (s, w3)  t = Concat <axis = 1> (c, s)
            u = Conv <pads = [1,1,1,1]> (t, w4)  g = Sigmoid (u)  v = Mul (u, g)
            y = Conv <pads = [1,1,1,1]> (v, w5)
        }"""
    return parse(text, {**weights, "b": normal(8)})


WEIGHTS = ("w1", "w2", "w3", "w4", "w5")


def test_tables_obey_the_rule_for_weights(tmp_path):
    (tmp_path / "mine.toml").write_text(
        'name = "mine"\ntitle = "Mine"\nextends = "ort-x64"\nweight.scale = "power of two"\n'
    )
    rng = np.random.default_rng(0)
    table = rng.normal(0, 1, (600, 32)).astype(np.float32)
    table[3], table[4] = 0, table[4] * 1e-12
    nodes = [
        helper.make_node("Gather", ["table", "x"], ["e"]),
        helper.make_node("ReduceMean", ["e"], ["m"], axes=[1], keepdims=0),
        helper.make_node("MatMul", ["m", "w"], ["y"]),
    ]
    constants = {"table": table, "w": rng.normal(0, 0.3, (32, 4)).astype(np.float32)}
    graph = helper.make_graph(
        nodes,
        "lookup",
        [helper.make_tensor_value_info("x", TensorProto.INT64, ["n", 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    samples = rng.integers(0, 600, (40, 6))
    result = eptq_onnx.quantize(model, samples, Config(preset="fast", target=str(tmp_path / "mine.toml")))
    values = {t.name: numpy_helper.to_array(t) for t in result.model.graph.initializer}
    assert values["table_quantized"].dtype == np.int8
    assert (np.frexp(values["table_scale"])[0] == 0.5).all()
    expected, got = (Session(m).run({"x": samples})["y"] for m in (model, result.model))
    assert sqnr(expected, got) > 25


def test_the_speed_of_another_runtime_is_not_measured(example, measured_speed):
    result = eptq_onnx.quantize(
        small_convnet(), images(8), Config(target=example, preset="fast"), progress=silent
    )
    assert result.report.speed is None
    assert "speed is not measured: mine is for a runtime other than onnxruntime" in result.report.notes
