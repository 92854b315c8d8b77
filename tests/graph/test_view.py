from __future__ import annotations

import numpy as np
import onnx
from graphs import normal, parse, small_convnet

from eptq_onnx.graph import edit
from eptq_onnx.graph.view import GraphView, opset_of
from eptq_onnx.proto.bodies import node_reads


def named(model: onnx.ModelProto) -> onnx.ModelProto:
    for k, node in enumerate(model.graph.node):
        node.name = f"n{k}"
    return onnx.shape_inference.infer_shapes(model)


def test_producers_readers_constants_and_shapes():
    view = GraphView(named(small_convnet()))
    assert view.inputs == ("image",)
    assert view.outputs == ("logits",)
    assert view.producer["a1"].op_type == "Clip"
    assert [n.op_type for n in view.consumers["a1"]] == ["Conv", "Add"]
    assert view.is_constant("w1")
    assert not view.is_constant("image")
    assert view.constant("w4").shape == (5, 8)
    assert view.shape("c1") == (None, 8, 8, 8)
    assert view.static_shape("c1") is None
    assert view.static_shape("w4") == (5, 8)
    assert view.is_float("c1")
    assert opset_of(view.model) == 17
    assert opset_of(view.model, "nobody") == 0


def test_reachability_stops_at_blocked_nodes():
    view = GraphView(
        named(
            parse(
                "g (float[N] x) => (float[N] d) { a = Relu (x)  b = Tanh (a)  c = Relu (b)  d = Add (c, x) }"
            )
        )
    )
    assert view.downstream(["a"]) == {"a", "b", "c", "d"}
    assert view.downstream(["a"], frozenset({"n1"})) == {"a"}
    assert view.upstream(["c"]) == {"c", "b", "a", "x"}
    assert view.upstream(["c"], frozenset({"n1"})) == {"c", "b"}


def test_a_subgraph_reads_from_outside():
    model = parse(
        "g (float[N] x, bool c) => (float[N] y) { t = Relu (x)"
        " y = If (c) <then_branch = a () => (float[N] p) { p = Neg (t) },"
        " else_branch = b () => (float[N] q) { q = Identity (x) }> }"
    )
    assert set(node_reads(model.graph.node[1])) == {"c", "t", "x"}


def test_the_builder_never_reuses_a_name():
    model = named(small_convnet())
    builder = edit.Builder(model, "p/")
    assert builder.unique("a1") == "a1_1"
    first, second = builder.add("Relu", ["a1"]), builder.add("Relu", ["a1"])
    assert first != second
    assert len({n.name for n in builder.nodes}) == 2
    assert builder.constant(1.0) == builder.constant(1.0) != builder.constant(2.0)
    assert builder.constant(np.zeros(2, np.float32)) != builder.constant(np.zeros((2, 1), np.float32))


def test_reductions_follow_the_opset():
    for opset, as_input in ((17, False), (18, True)):
        builder = edit.Builder(parse("g (float[N,3] x) => (float[N,3] y) { y = Relu (x) }", opset=opset))
        builder.reduce("ReduceMean", "x", [1])
        builder.reduce("ReduceSum", "x", [1])
        mean, total = builder.nodes
        assert (len(mean.input) == 2) is as_input
        assert len(total.input) == 2


def test_outputs_keep_their_types_and_shapes():
    model = named(small_convnet())
    edit.set_outputs(model, ["c1"])
    edit.set_outputs(model, ["logits"])
    dims = model.graph.output[0].type.tensor_type.shape.dim
    assert [d.dim_value or d.dim_param for d in dims] == ["N", 5]
    assert [v.name for v in model.graph.value_info].count("c1") == 1


def test_specialize_fixes_all_shapes_and_prune_drops_the_rest():
    fixed = edit.specialize(named(small_convnet()), {"image": (2, 3, 8, 8)})
    assert GraphView(fixed).static_shape("s") == (2, 8, 8, 8)
    edit.set_outputs(fixed, ["a1"])
    edit.prune(fixed)
    assert [n.op_type for n in fixed.graph.node] == [
        "Conv",
        "BatchNormalization",
        "Constant",
        "Constant",
        "Clip",
    ]
    assert "w4" not in GraphView(fixed).initializers


def test_promotion_turns_constants_into_inputs():
    model = parse("g (float[N,3] x) => (float[N,4] y) { y = Gemm (x, w) }", {"w": normal(3, 4)})
    edit.promote_to_inputs(model, ["w"])
    assert GraphView(model).inputs == ("x", "w")
    edit.promote_to_inputs(model, ["w"])
    assert GraphView(model).inputs == ("x", "w")
