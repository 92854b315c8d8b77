"""Weights in blocks: every way to store them computes what the plan says."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from graphs import normal, parse, silent
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

import eptq_onnx
from eptq_onnx import Config, ConfigError, targets
from eptq_onnx.config import WeightStorage
from eptq_onnx.graph import blocks
from eptq_onnx.graph.storing import stored, stored_in_blocks
from eptq_onnx.graph.view import GraphView
from eptq_onnx.method.calibrate.constants import constant_grids
from eptq_onnx.method.normalize import normalize
from eptq_onnx.method.plan import plan
from eptq_onnx.method.qdq import write
from eptq_onnx.method.ranges import weight_ranges
from eptq_onnx.probes import newest_readable
from eptq_onnx.records import Calibration
from eptq_onnx.runtime import Session
from eptq_onnx.runtimes.nbits import has_matmul_nbits

INT4 = newest_readable()[0] >= 21 and newest_readable()[1] >= 10


def network(terms=40, outputs=24, shared=False, rank=3, table=False):
    """Products of all kinds; with ``table`` the first input is rows of what the last product multiplies by."""
    rows = {2: "float[N,40] x", 3: "float[N,T,40] x", 4: "float[N,2,T,40] x"}[rank].replace("40", str(terms))
    start = "a0 = Gather (table, x)" if table else "a0 = Identity (x)"
    end = "y = MatMul (l, turned)" if table else "y = Identity (l)"
    body = f"""
        g ({"int64[N,T] x" if table else rows}) => (float y, float z) {{
            {start}
            a = MatMul (a0, w1)  b = Tanh (a)  c = MatMul (b, w2)  d = Add (c, b2)  e = Tanh (d)
            f = Reshape (e, flat)
            i = Gemm <transB = 1> (f, w3, b3)  j = Tanh (i)  z = Gemm <alpha = 0.5> (j, w4)
            k = MatMul (e, {"w2b" if not shared else "w1"})  l = Tanh (k)
            {end}
        }}
        """
    n = terms
    values = {
        "w1": normal(n, n, seed=1),
        "w2": normal(n, n, seed=2),
        "w2b": normal(n, n, seed=6),
        "b2": normal(n, seed=3),
        "flat": np.array([-1, n], np.int64),
        "w3": normal(outputs, n, seed=4),
        "b3": normal(outputs, seed=5),
        "w4": normal(outputs, 3 * n, seed=7),
        "table": normal(700, n, seed=8),
        "turned": np.ascontiguousarray(normal(700, n, seed=8).T),
    }
    used = [name for name in values if name in body.replace("w2b", "" if shared else "w2b")]
    if shared:
        used = [name for name in used if name != "w2b"]
    return parse(body, {name: values[name] for name in used})


def planned(model, bits, size, target="ort-x64", edge=None, storage=None):
    config = Config(bits=f"w{bits}a32", edge_bits=edge or bits, block=size, target=target, storage=storage)
    found = targets.load(target)
    whole = normalize(model, max(21, found.min_opset))
    made = plan(whole, found, config)
    tables = constant_grids(made, GraphView(whole))
    rounding = weight_ranges(whole, made, Calibration(tables, {}, {}), None, Config(preset="fast"))
    return whole, made, rounding


def rounded(whole, made, rounding):
    """The float network with the rounded values of its weights and tables."""
    result = type(whole)()
    result.CopyFrom(whole)
    exact = {n: rounding.weights[n].dequantize(v) for n, v in rounding.integers.items()}
    for table in made.tables:
        value = GraphView(whole).constant(table.name)
        if table.weight:
            own = exact[table.weight]
            exact[table.name] = own if own.shape == value.shape else own.T
        else:
            exact[table.name] = rounding.grids[table.name].round(value)
    for tensor in result.graph.initializer:
        if tensor.name in exact:
            tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(exact[tensor.name]), tensor.name))
    return result


def as_stored(marked, storage, widths=(4,), level=1):
    made = stored_in_blocks(marked, storage, widths, level)
    rest = WeightStorage.INT8 if storage is WeightStorage.INT8 else WeightStorage.PACKED
    return stored(made, rest, ())[0]


def agree(one, other, feeds, **options):
    for name, value in Session(one).run(feeds).items():
        found = Session(other, **options).run(feeds)[name]
        np.testing.assert_allclose(found, value, rtol=2e-4, atol=2e-4 * np.abs(value).max())


STORAGES = [WeightStorage.PACKED, WeightStorage.INT8, WeightStorage.MATMULNBITS] + [
    WeightStorage.NATIVE
] * INT4


@settings(max_examples=25, deadline=None)
@given(
    net=st.tuples(
        st.sampled_from([48, 64, 77]), st.integers(33, 50), st.booleans(), st.integers(2, 4), st.booleans()
    ),
    bits=st.sampled_from([2, 3, 4, 8]),
    size=st.sampled_from([16, 32, 64]),
    storage=st.sampled_from(STORAGES),
)
def test_the_file_computes_what_the_plan_says(net, bits, size, storage):
    terms, _, _, rank, table = net
    model = network(*net)
    whole, made, rounding = planned(model, bits, size)
    assert {x.op_type for x in made.layers} == {"MatMul", "Gemm"}
    marked, _ = write(whole, made, rounding)
    shape = (2, 5) if table else {2: (5, terms), 3: (2, 5, terms), 4: (3, 2, 5, terms)}[rank]
    x = np.random.default_rng(0).integers(0, 700, shape) if table else normal(*shape, seed=9)
    exact = rounded(whole, made, rounding)
    agree(exact, marked, {"x": x}, integers=False)
    widths = (4, 8) if storage is WeightStorage.NATIVE else (4,)
    file = as_stored(marked, storage, widths)
    kinds = Counter(n.op_type for n in file.graph.node)
    if storage is WeightStorage.MATMULNBITS and bits == 4:
        # A Gemm with a factor is no such product.
        assert kinds["MatMulNBits"] == len(made.layers) - 1
    elif storage is WeightStorage.NATIVE:
        assert kinds["DequantizeLinear"] == len(made.weight_specs)
        assert not any(a.name == "transB" for n in file.graph.node for a in n.attribute)
    if storage is not WeightStorage.NATIVE or bits < 8:
        agree(exact, file, {"x": x}, integers=False)


def test_a_table_that_is_a_layers_weight_is_stored_once():
    whole, made, rounding = planned(network(64, table=True), 4, 32)
    [table] = made.tables
    assert table.weight == "turned"
    marked, _ = write(whole, made, rounding)
    for storage in (WeightStorage.MATMULNBITS, WeightStorage.PACKED, WeightStorage.INT8):
        file = as_stored(marked, storage)
        values = [t for t in file.graph.initializer if np.prod(t.dims) * 8 >= 700 * 64 * 4]
        assert len(values) == 1, storage
    assert len(values[0].raw_data) == 700 * 64


def test_other_tables_are_packed_and_keep_their_rows():
    model = parse("g (int64[N] x) => (float[N,45] y) { a = Gather (t, x)  y = MatMul (a, w) }", {"t": normal(900, 45), "w": normal(45, 45)})  # fmt: skip
    whole, made, rounding = planned(model, 4, 32)
    marked, _ = write(whole, made, rounding)
    file = as_stored(marked, WeightStorage.MATMULNBITS)
    assert any(t.dims == [900, 23] for t in file.graph.initializer)
    agree(rounded(whole, made, rounding), file, {"x": np.arange(7)}, integers=False)


def test_rows_of_a_scalar_index_and_of_an_unknown_rank_are_found():
    for index in ("int64 x", "int64[] x"):
        model = parse(f"g ({index}) => (float y) {{ a = Gather (t, x)  y = MatMul (a, w) }}", {"t": normal(900, 32), "w": normal(32, 45)})  # fmt: skip
        whole, made, rounding = planned(model, 4, 32)
        marked, _ = write(whole, made, rounding)
        file = as_stored(marked, WeightStorage.PACKED)
        agree(rounded(whole, made, rounding), file, {"x": np.array(5)}, integers=False)


def test_what_is_found_are_the_constants_that_were_written():
    whole, made, rounding = planned(network(), 4, 32)
    marked, _ = write(whole, made, rounding)
    view = GraphView(marked)
    found = blocks.found(view)
    assert len(found) == len(made.weight_specs)
    for one in found:
        assert blocks.size_of(view, one.blocks) in (32, 16)
        assert 2 <= blocks.width_of(view, one.blocks) <= 4
    assert blocks.found(GraphView(network())) == []


def test_symmetric_blocks_have_no_zero_points():
    whole, made, rounding = planned(network(64), 4, 64, "tensorrt", storage="native")
    marked, _ = write(whole, made, rounding)
    assert all(one.blocks.zero is None for one in blocks.found(GraphView(marked)))
    if INT4:
        agree(rounded(whole, made, rounding), as_stored(marked, WeightStorage.NATIVE, (4, 8)), {"x": normal(2, 3, 64)}, integers=False)  # fmt: skip


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"block": 32}, "block is for weights alone: give activations 32 bits, as in bits w4a32."),
        ({"bits": "w4a32", "block": 32, "budget": "weights=4"}, "a budget chooses no bits of weights in blocks: leave it out, or leave block out."),
        ({"bits": "w4a32", "block": 32, "steps": 5}, "steps are not for weights in blocks, which no step learns: leave steps out."),
        ({"bits": "w4a32", "storage": "matmulnbits"}, "storage=matmulnbits is for weights in blocks: give block, such as 32."),
        ({"bits": "w4a32", "block": 32, "target": "tensorrt"}, "option block=32 is not for target tensorrt, which reads blocks of 64, 128 (its blocks.sizes): choose one of these."),
        ({"bits": "w4a32", "block": 64, "target": "tensorrt", "storage": "matmulnbits"}, "option storage=matmulnbits is not for target tensorrt with weights in blocks: choose native, or leave it out."),
        ({"bits": "w4a32", "block": 48}, "option block=48 is not for storage=matmulnbits, whose blocks are a power of two of at least 16: choose such a size, or storage=packed."),
        ({"bits": "w4a32", "block": 32, "target": "qnn"}, "option block is not for target qnn, which reads no weights in blocks (its blocks.sizes is empty): leave it out."),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_one_sentence(options, sentence):
    with pytest.raises(ConfigError) as e:
        eptq_onnx.quantize(
            network(), {"x": normal(8, 3, 40)}, Config(**{"target": "ort-x64", **options}), progress=silent
        )
    assert str(e.value) == sentence


@pytest.mark.parametrize("storage", [s.value for s in STORAGES])
def test_from_data_to_a_file_that_obeys_its_target(storage):
    model, data = network(64, 24), {"x": normal(40, 6, 64)}
    config = Config(
        bits="w4a32",
        edge_bits=4,
        block=32,
        preset="fast",
        storage=storage,
        target="ort-x64",
        measure_speed=False,
    )
    result = eptq_onnx.quantize(model, data, config, progress=silent)
    assert min(result.report.verification.outputs.values()) > 9
    assert result.report.sizes["weights"] < (1.1 if storage == "int8" else 0.65) * 64 * 64 * 5
    assert not eptq_onnx.lint(result.model, "ort-x64").findings
    if storage == "native":
        errors = {f.rule for f in eptq_onnx.lint(result.model, "tensorrt").findings}
        assert "block-size" in errors


def test_the_runtime_is_asked_which_widths_it_has():
    assert has_matmul_nbits(4)
    assert not has_matmul_nbits(3)


@pytest.mark.parametrize("options", [{"block": 32}, {"block": 32, "edge_bits": 4, "storage": "packed"}, {}])
def test_without_data_weights_are_rounded_to_nearest(options):
    model = network(64, 24, table=True)
    result = eptq_onnx.quantize(
        model, config=Config(bits="w4a32", target="ort-x64", **options), progress=silent
    )
    report = result.report
    assert (report.samples, report.verification.samples) == (0, 0)
    assert "no samples were given" in str(report.verdict)
    assert not report.advice
    assert report.sizes["weights"] < 0.4 * model.ByteSize()
    assert "no samples" in report.to_markdown()
    x = {"x": np.arange(20).reshape(2, 10)}
    exact, found = Session(model).run(x), Session(result.model).run(x)
    for name, value in exact.items():
        assert np.square(found[name] - value).sum() < 0.3 * np.square(value).sum()
    if options.get("storage") is None and "block" in options:
        assert report.verification.planned["MatMulNBits"] == report.verification.kernels["MatMulNBits"] >= 3
        assert report.sizes["scales and zero points"] > 64 * 64 * 4 / 32


def test_activations_need_data():
    with pytest.raises(ConfigError, match="fixed ranges of activations need samples"):
        eptq_onnx.quantize(network(), config=Config(), progress=silent)
    with pytest.raises(ConfigError, match="rest=float16 needs samples"):
        eptq_onnx.quantize(network(), config=Config(bits="w4a32", rest="float16"), progress=silent)
