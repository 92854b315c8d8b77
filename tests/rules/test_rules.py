"""Each rule fails a file that breaks it and nothing else, and files written for a target obey all of its rules."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from graphs import images, normal, parse, silent, small_convnet
from onnx import ModelProto, helper, numpy_helper
from typer.testing import CliRunner

import eptq_onnx
from eptq_onnx import Config, targets
from eptq_onnx.cli import app
from eptq_onnx.rules import RULES, Severity, lint

pytestmark = pytest.mark.once

HEAD = 'name = "mine"\ntitle = "Mine"\nextends = "ort-x64"\n'


@pytest.fixture(scope="module")
def written() -> ModelProto:
    """A file that obeys all rules of ort-x64."""
    config = Config(preset="fast", target="ort-x64")
    return eptq_onnx.quantize(small_convnet(), {"image": images()}, config, progress=silent).model


def node_of(model: ModelProto, op_type: str, place: int = 0) -> onnx.NodeProto:
    return [n for n in model.graph.node if n.op_type == op_type][place]


def made_by(model: ModelProto, tensor: str) -> onnx.NodeProto:
    return next(n for n in model.graph.node if tensor in n.output)


def replaced(model: ModelProto, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    tensor = next(t for t in model.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor)), name))


def apart(
    model: ModelProto, node: onnx.NodeProto, place: int, change: Callable[[np.ndarray], np.ndarray]
) -> None:
    """Give a node an initializer of its own, and change that."""
    tensor = next(t for t in model.graph.initializer if t.name == node.input[place])
    name = f"{tensor.name}_own"
    model.graph.initializer.append(numpy_helper.from_array(change(numpy_helper.to_array(tensor)), name))
    node.input[place] = name


def weight_reader(model: ModelProto, op_type: str = "Conv", place: int = 0) -> onnx.NodeProto:
    """Return the DequantizeLinear of the weight of the first Conv."""
    return made_by(model, node_of(model, op_type, place).input[1])


# ---- one broken file for each rule -------------------------------------------------------------------------
def _scale(model: ModelProto) -> None:
    apart(model, weight_reader(model), 1, lambda s: s * (np.arange(len(s)) > 0).astype(np.float32))


def _opset(model: ModelProto) -> None:
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and node.name.startswith("image"):
            apart(model, node, 2, lambda z: z.astype(np.uint16))


def _type(model: ModelProto) -> None:
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and node.name.startswith("image"):
            apart(model, node, 2, lambda z: z.astype(np.int8))


def _zero_point(model: ModelProto) -> None:
    apart(model, weight_reader(model), 2, lambda z: z + np.int8(3))


def _bias_scale(model: ModelProto) -> None:
    apart(model, made_by(model, node_of(model, "Conv").input[2]), 1, lambda s: s * np.float32(2))


def _activation_scale(model: ModelProto) -> None:
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and node.name.startswith("image"):
            for place in (1, 2):
                apart(model, node, place, lambda v: np.repeat(v.reshape(1), 3))


def _weight_axis(model: ModelProto) -> None:
    node = weight_reader(model, place=2)
    node.attribute[0].i = 1


def _weight_range(model: ModelProto) -> None:
    apart(model, weight_reader(model), 0, lambda w: np.where(w == w.max(), np.int8(127), w))


def _narrow_range(model: ModelProto) -> None:
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and node.name.startswith("image"):
            apart(model, node, 1, lambda s: s * np.float32(1e-9))


def _without_input_pair(model: ModelProto) -> None:
    node_of(model, "Conv").input[0] = "image"


def _float_reader(model: ModelProto) -> None:
    conv = node_of(model, "Conv", 1)
    model.graph.node.append(helper.make_node("Abs", [conv.output[0]], ["absolute"], name="absolute"))
    model.graph.output.append(helper.make_tensor_value_info("absolute", onnx.TensorProto.FLOAT, None))


def _unequal(model: ModelProto) -> None:
    """The pair behind Flatten, of the group that GlobalAveragePool begins."""
    flat = node_of(model, "Flatten")
    quantize = next(n for n in model.graph.node if n.input[0] == flat.output[0])
    read = next(n for n in model.graph.node if n.input[0] == quantize.output[0])
    for node in (quantize, read):
        apart(model, node, 1, lambda s: s * np.float32(1.5))
    bias = made_by(model, node_of(model, "Gemm").input[2])
    apart(model, bias, 1, lambda s: s * np.float32(1.5))


CHANGED: dict[str, tuple[Callable[[ModelProto], None], str]] = {
    "scale": (_scale, ""),
    "opset": (_opset, ""),
    "type": (_type, 'verifier = "none"\n'),
    "kernel-type": (_type, ""),
    "zero-point": (_zero_point, ""),
    "bias-zero-point": (lambda model: None, "[bias]\nzero_point = false\n"),
    "bias-scale": (_bias_scale, ""),
    "activation-scale": (_activation_scale, ""),
    "weight-axis": (_weight_axis, ""),
    "power-of-two": (lambda model: None, '[weight]\nscale = "power of two"\n'),
    "weight-range": (_weight_range, ""),
    "range": (_narrow_range, "[activation]\nleast_range = 1e-4\n"),
    "output-range": (lambda model: None, "[operators.GlobalAveragePool]\noutput_range = [0, 1]\n"),
    "static": (lambda model: None, 'shapes = "static"\n'),
    "shift": (lambda model: None, "[operators.Add]\nshifts = { spread = [40, 50] }\n"),
    "layer-input": (_without_input_pair, ""),
    "layer-output": (_float_reader, ""),
    "shared-scale": (_unequal, ""),
    "residual": (lambda model: None, '[operators.Add]\ninputs = "residual"\n'),
    "moved": (lambda model: None, '[operators.Flatten]\noutput = "float"\n'),
    "size": (lambda model: None, "[operators.Conv]\nleast = { input_channels = 6 }\n"),
}
"""Rule to a change of the written file that breaks it, and what the target says beyond ort-x64."""

ONE, EIGHT = np.float32(0.05), np.uint8(128)
PAIR = "{0}q = QuantizeLinear ({0}, s, z)  {0}d = DequantizeLinear ({0}q, s, z)"
PARSED: dict[str, tuple[str, str]] = {
    "integer-operator": (
        f"g (float[2,3] x) => (uint8[2,3] y) {{ {PAIR.format('x')}  xe = QLinearMatMul (xq, s, z, eye, s, z, s, z)"
        "  y = Identity (xe) }",
        'verifier = "none"\n',
    ),
    "between": (
        "g (float[2,3] x) => (float[2,4] y) { xq = QuantizeLinear (x, s, z)  xc = Clip (xq, low, high)"
        " xd = DequantizeLinear (xc, s, z)  wd = DequantizeLinear (w, s)  y = MatMul (xd, wd) }",
        "[activation]\nnarrow = false\n",
    ),
    "packed": (
        f"g (float[2,3] x) => (float[2,4] y) {{ {PAIR.format('x')}  wi = Transpose (wt)"
        "  wd = DequantizeLinear (wi, s)  y = MatMul (xd, wd) }",
        "[weight]\npacked = false\n",
    ),
    "block-size": (
        "g (float[2,64] x) => (float[2,4] y) { wd = DequantizeLinear <axis = 0, block_size = 16> (wb, sb)"
        "  y = MatMul (x, wd) }",
        "[blocks]\nsizes = [64, 128]\n",
    ),
    "clipped-floats": (
        "g (float[2,3] x) => (float[2,4] y) { r = Relu (x)  rq = QuantizeLinear (r, s, f)"
        "  rd = DequantizeLinear (rq, s, f)  wd = DequantizeLinear (w, s)  y = MatMul (rd, wd) }",
        '[activation]\ncontainer = "float8e4m3fn"\nsymmetric = true\n[bias]\ninteger = false\n',
    ),
    "idle-pair": (f"g (float[2,3] x) => (float[2,3] y) {{ {PAIR.format('x')}  y = Softmax (xd) }}", ""),
    "one-width": (
        f"g (float[2,3] x) => (float[2,4] y) {{ {PAIR.format('x')}  wd = DequantizeLinear (w, s)"
        "  m = MatMul (xd, wd)  mq = QuantizeLinear (m, s, wide)  y = DequantizeLinear (mq, s, wide) }",
        "[activation]\nwide = true\n",
    ),
    "pattern": (
        f"g (float[2,3] x) => (float[2,4] y) {{ {PAIR.format('x')}  e = Sigmoid (xd)  {PAIR.format('e')}"
        f" m = Mul (xd, ed)  {PAIR.format('m')}  wd = DequantizeLinear (w, s)  y = MatMul (md, wd) }}",
        '[patterns]\nkeep = ["silu"]\n',
    ),
    "network-output": (
        f"g (float[2,3] x) => (float[2,4] y) {{ {PAIR.format('x')}  wd = DequantizeLinear (w, s)"
        "  r = MatMul (xd, wd)  rq = QuantizeLinear (r, s, z)  y = DequantizeLinear (rq, s, z) }",
        'outputs = "float"\n',
    ),
}
"""Rule to a graph that breaks it, and what the target says beyond ort-x64."""


def broken(rule: str, written: ModelProto) -> tuple[ModelProto, str]:
    if rule in PARSED:
        text, target = PARSED[rule]
        constants: dict[str, Any] = {
            "s": np.array(ONE), "z": np.array(EIGHT), "low": np.array(0, np.uint8), "high": np.array(15, np.uint8),
            "w": normal(3, 4, scale=9).astype(np.int8), "wt": normal(4, 3, scale=9).astype(np.int8), "eye": np.eye(3, dtype=np.uint8),
            "wide": np.array(0, np.uint16), "wb": normal(64, 4, scale=9).astype(np.int8), "sb": np.ones((4, 4), np.float32),
        }  # fmt: skip
        model = parse(text, {k: v for k, v in constants.items() if re.search(rf"\b{k}\b", text)})
        if "block_size" in text or "wide" in text:
            model.opset_import[0].version = 21
        if "f)" in text:
            float8 = onnx.TensorProto.FLOAT8E4M3FN
            model.graph.initializer.append(onnx.TensorProto(name="f", data_type=float8, raw_data=b"\0"))
            model.opset_import[0].version = 19
        return model, target
    change, target = CHANGED[rule]
    model = ModelProto()
    model.CopyFrom(written)
    change(model)
    return model, target


def target_of(folder: Path, text: str) -> str:
    (folder / "mine.toml").write_text(HEAD + text, encoding="utf-8")
    return str(folder / "mine.toml")


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
def test_each_rule_fails_a_file_that_breaks_it(tmp_path, written, rule):
    model, text = broken(rule.name, written)
    found = eptq_onnx.lint(model, target_of(tmp_path, text)).findings
    assert rule.name in {f.rule for f in found}, found
    # Only what follows from the same fault is found beside it.
    assert {f.rule for f in found} <= {rule.name, "layer-output", "idle-pair", "bias-scale"}, found
    [first, *_] = [f for f in found if f.rule == rule.name]
    assert first.node in {n.name or n.output[0] for n in model.graph.node}
    assert first.severity is rule.severity
    assert not first.message.endswith(".")
    assert first.remedy.endswith(".")


def test_every_rule_has_a_broken_file():
    assert {r.name for r in RULES} == CHANGED.keys() | PARSED.keys()


@pytest.mark.parametrize("target", targets.names())
@pytest.mark.parametrize("bits", [4, 8])
def test_what_is_written_for_a_target_obeys_its_rules(target, bits):
    rules = targets.load(target)
    if rules.weight.container != "int8" and bits < 8:
        pytest.skip("its weights have 8 bits")
    config = Config(preset="fast", target=target, weight_bits=bits)
    float_model = small_convnet(batch=1 if rules.shapes == "static" else "n")
    model = eptq_onnx.quantize(float_model, {"image": images()}, config, progress=silent).model
    found = lint(model, rules)
    assert found.findings == ()
    assert found.pairs > 5


def test_a_float_model_has_nothing_to_find():
    found = eptq_onnx.lint(small_convnet())
    assert (found.pairs, found.findings) == (0, ())


def test_the_model_is_left_alone(written):
    before = written.SerializeToString(deterministic=True)
    eptq_onnx.lint(written)
    assert written.SerializeToString(deterministic=True) == before


CONSTANTS: dict[str, Any] = {
    "s": np.array(ONE),
    "z": np.array(EIGHT),
    "w": normal(3, 4, scale=9).astype(np.int8),
}
LAYER = f"{PAIR.format('x')}  wd = DequantizeLinear (w, s, three)  {{}} = MatMul (xd, wd)"
BODIES = {
    "one branch": (
        "g (float[2,3] x, bool c) => (float[2,4] y) { y = If (c) <then_branch = t () => (float[2,4] u) { "
        + LAYER.format("u")
        + " }, else_branch = e () => (float[2,4] v) { v = Constant <value = float[2,4] {1,1,1,1,1,1,1,1}> () }> }",
        ["then_branch of y"],
    ),
    "both branches, with the same names": (
        "g (float[2,3] x, bool c) => (float[2,4] y) { y = If (c) <then_branch = t () => (float[2,4] u) { "
        + LAYER.format("u") + " }, else_branch = e () => (float[2,4] u) { " + LAYER.format("u") + " }> }",
        ["then_branch of y", "else_branch of y"],
    ),
    "a loop": (
        "g (float[2,3] x, int64 n, bool c) => (float[k,2,4] y) { y = Loop (n, c) <body = b (int64 i, bool go) => "
        "(bool on, float[2,4] u) { on = Identity (go) " + LAYER.format("u") + " }> }",
        ["body of y"],
    ),
    "a branch in a loop": (
        "g (float[2,3] x, int64 n, bool c) => (float[k,2,4] y) { y = Loop (n, c) <body = b (int64 i, bool go) => "
        "(bool on, float[2,4] u) { on = Identity (go)  u = If (go) <then_branch = t () => (float[2,4] p) { "
        + LAYER.format("p") + " }, else_branch = e () => (float[2,4] p) { " + LAYER.format("p") + " }> }> }",
        ["then_branch of u in body of y", "else_branch of u in body of y"],
    ),
    "what a branch reads from outside": (
        f"g (float[2,3] x, bool c) => (float[2,4] y) {{ {PAIR.format('x')}  y = If (c) <then_branch = t () => "
        "(float[2,4] u) { wd = DequantizeLinear (w, s, three)  u = MatMul (xd, wd) }, else_branch = e () => "
        "(float[2,4] v) { v = Constant <value = float[2,4] {1,1,1,1,1,1,1,1}> () }> }",
        ["then_branch of y"],
    ),
}  # fmt: skip
"""Weights with a zero point of 3, in bodies, and where each is found."""


@pytest.mark.parametrize(("text", "places"), BODIES.values(), ids=BODIES)
def test_rules_see_into_bodies_and_say_where(text, places):
    found = eptq_onnx.lint(parse(text, {**CONSTANTS, "three": np.array(3, np.int8)}), "ort-x64-vnni")
    wrong = [f for f in found.findings if f.rule == "zero-point"]
    assert [f.where for f in wrong] == places
    assert {f.node for f in wrong} <= {"wd", "wd_1"}
    # Nothing else is wrong: what a body reads from outside is seen by the rules, too.
    assert {f.rule for f in found.findings} == {"zero-point"}
    assert found.pairs == 2 * len(places)
    sound = eptq_onnx.lint(parse(text, {**CONSTANTS, "three": np.array(0, np.int8)}), "ort-x64-vnni")
    assert sound.findings == ()


def test_rules_see_into_functions_and_say_where():
    text = (
        '<ir_version: 8, opset_import: ["" : 17, "own" : 1]> g (float[2,3] x, int8[3,4] w, float s, uint8 z, '
        "int8 three) => (float[2,4] y) { y = own.Layer (x, w, s, z, three) } "
        '<domain: "own", opset_import: ["" : 17]> Layer (x, w, s, z, three) => (u) { '
        + LAYER.format("u")
        + " }"
    )
    model = onnx.parser.parse_model(text)
    values = {**CONSTANTS, "three": np.array(3, np.int8)}
    del model.graph.input[1:]
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in values.items())
    found = eptq_onnx.lint(model, "ort-x64-vnni").findings
    assert [(f.rule, f.where) for f in found] == [("zero-point", "function Layer")]


def test_types_that_a_target_stores_weights_in_are_right():
    config = Config(preset="fast", target="qnn", weight_bits=4, storage="native")
    model = eptq_onnx.quantize(small_convnet(batch=1), {"image": images()}, config, progress=silent).model
    assert {t.data_type for t in model.graph.initializer} & {onnx.TensorProto.INT4, onnx.TensorProto.UINT4}
    assert not [f for f in lint(model, targets.load("qnn")).findings if f.rule == "type"]


# ---- the command -------------------------------------------------------------------------------------------
@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: ModelProto) -> Path:
    monkeypatch.chdir(tmp_path)
    onnx.save(written, "good.onnx")
    for name, change in (("error", _zero_point), ("warning", _weight_range)):
        model = ModelProto()
        model.CopyFrom(written)
        change(model)
        onnx.save(model, f"{name}.onnx")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "code", "shown"),
    [
        (("good.onnx",), 0, "good.onnx for ort-x64: 0 errors and 0 warnings"),
        (("error.onnx",), 1, "error zero-point: Quantize symmetrically."),
        (("warning.onnx",), 0, "warning weight-range"),
        (("warning.onnx", "--strict"), 1, "warning weight-range"),
        (("warning.onnx", "--strict", "--target", "ort-x64-vnni"), 0, "0 errors and 0 warnings"),
    ],
)
def test_the_exit_code_says_whether_rules_are_broken(saved, arguments, code, shown):
    result = CliRunner().invoke(app, ["lint", *arguments])
    assert result.exit_code == code, result.output
    assert shown in result.stdout


def test_json_lists_every_finding(saved):
    result = CliRunner().invoke(app, ["lint", "error.onnx", "--json"])
    assert result.exit_code == 1
    content = json.loads(result.stdout)
    assert content["counts"] == {"error": 1, "warning": 0}
    assert [f["rule"] for f in content["findings"]] == ["zero-point"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("missing.onnx",), "model file missing.onnx does not exist."),
        (("good.onnx", "--target", "tpu"), "target 'tpu' is unknown: choose one of"),
    ],
)
def test_what_cannot_be_checked_is_one_sentence(saved, arguments, sentence):
    result = CliRunner().invoke(app, ["lint", *arguments])
    assert result.exit_code == 2
    assert sentence in " ".join(result.stderr.split())


def test_severities_are_what_a_runtime_makes_of_a_fault():
    assert {r.severity for r in RULES} == set(Severity)
