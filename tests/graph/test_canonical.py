import numpy as np
import onnx
import pytest
from graphs import normal, parse
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import NodeProto, TensorProto, helper, numpy_helper

from eptq_onnx.graph import io
from eptq_onnx.graph.canonical import make_canonical
from eptq_onnx.proto.bodies import defined, subgraphs
from eptq_onnx.runtime import Session

X = normal(3, 4, seed=9)


def chain(count=6):
    """Return a chain of layers, each with a residual sum over two of them."""
    nodes, last, before = [], "x", "x"
    for k in range(count):
        nodes.append(helper.make_node("MatMul", [last, "w"], [f"p{k}"]))
        nodes.append(helper.make_node("Add", [f"p{k}", before], [f"s{k}"]))
        last, before = f"s{k}", last
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in ("x", last)]
    graph = helper.make_graph(
        nodes, "chain", info[:1], info[1:], [numpy_helper.from_array(normal(4, 4, scale=0.3), "w")]
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def run(model):
    # onnxruntime 1.19 reads past the end of a shape when it optimizes a model with wrong declared ranks.
    return list(Session(model, optimize=False).run({"x": X}).values())


@settings(max_examples=20, deadline=None)
@given(order=st.permutations(range(12)))
def test_nodes_in_any_order_are_sorted(order):
    model = chain()
    expected = run(model)
    nodes = [NodeProto.FromString(model.graph.node[k].SerializeToString()) for k in order]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    loaded = io.load(model)
    np.testing.assert_array_equal(run(loaded)[0], expected[0])
    onnx.checker.check_model(loaded)


def test_sorted_nodes_keep_their_order():
    model = chain()
    loaded = io.load(model)
    assert list(loaded.graph.node) == list(model.graph.node)


def no_type(model):
    model.graph.output[0].ClearField("type")


def no_output_shape(model):
    model.graph.output[0].type.tensor_type.ClearField("shape")


def no_input_shape(model):
    model.graph.input[0].type.tensor_type.ClearField("shape")


def wrong_output_rank(model):
    model.graph.output[0].CopyFrom(
        helper.make_tensor_value_info(model.graph.output[0].name, TensorProto.FLOAT, ["n"])
    )


def wrong_output_size(model):
    model.graph.output[0].CopyFrom(
        helper.make_tensor_value_info(model.graph.output[0].name, TensorProto.FLOAT, ["n", 77])
    )


def wrong_inner_rank(model):
    model.graph.value_info.append(helper.make_tensor_value_info("p2", TensorProto.FLOAT, ["a", "b", "c"]))


def stray_info(model):
    model.graph.value_info.append(helper.make_tensor_value_info("nowhere", TensorProto.FLOAT, [1]))


def no_graph_name(model):
    model.graph.name = ""


def no_ir_version(model):
    model.ClearField("ir_version")


def ir_3_with_constants_that_are_no_inputs(model):
    model.ir_version = 3


def ir_3_with_constants_that_are_inputs(model):
    model.ir_version = 3
    model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [4, 4]))


def default_domain_by_its_other_name(model):
    model.opset_import[0].domain = "ai.onnx"
    for node in model.graph.node:
        node.domain = "ai.onnx"


def operator_sets_twice(model):
    model.opset_import.extend([helper.make_opsetid("own.domain", 1), helper.make_opsetid("own.domain", 2)])


def no_import_of_onnxruntimes_domain(model):
    model.graph.node[1].op_type, model.graph.node[1].domain = "Gelu", "com.microsoft"
    del model.graph.node[1].input[1:]


def no_import_of_the_default_domain(model):
    model.opset_import[0].domain, model.opset_import[0].version = "com.microsoft", 1


def constant_twice(model):
    model.graph.initializer.append(numpy_helper.from_array(normal(4, 4, seed=5), "w"))


def output_twice(model):
    model.graph.output.append(model.graph.output[0])


def input_as_output(model):
    model.graph.output.append(model.graph.input[0])


def constant_as_output(model):
    model.graph.output.add(name="w")


def only_a_constant_as_output(model):
    del model.graph.output[:]
    model.graph.output.add(name="w")


def only_an_input_as_output(model):
    del model.graph.output[:]
    model.graph.output.add(name="x")


ODD = [
    no_type, no_output_shape, no_input_shape, wrong_output_rank, wrong_output_size, wrong_inner_rank,
    stray_info, no_graph_name, no_ir_version, ir_3_with_constants_that_are_no_inputs,
    ir_3_with_constants_that_are_inputs, default_domain_by_its_other_name, operator_sets_twice,
    no_import_of_onnxruntimes_domain, no_import_of_the_default_domain, constant_twice, output_twice,
    input_as_output, constant_as_output, only_a_constant_as_output, only_an_input_as_output,
]  # fmt: skip


@pytest.mark.parametrize("change", ODD, ids=lambda f: f.__name__)
def test_models_that_onnxruntime_accepts_are_accepted(change):
    model = chain()
    change(model)
    runnable = onnx.ModelProto.FromString(model.SerializeToString())
    runnable.ir_version = runnable.ir_version or 8
    expected = run(runnable)
    loaded = io.load(model)
    for got, wanted in zip(run(loaded), expected, strict=True):
        np.testing.assert_array_equal(got, wanted)
    assert [o.name for o in loaded.graph.output] == [o.name for o in model.graph.output]
    assert all(o.type.tensor_type.elem_type == TensorProto.FLOAT for o in loaded.graph.output)


BODY = """
    c = ReduceSum <keepdims = 0> (x)
    flag = Greater (c, zero)
    h = MatMul (x, w)
    r = If (flag) <
        then_branch = t () => (float[N,4] {0}) {{ {1} = Relu (h)  {0} = Neg ({1}) }},
        else_branch = e () => (float[N,4] {2}) {{ {2} = Abs (h) }}
    >
    y = Add (r, h)
"""
NAMES = ["y", "a", "b", "r", "eptq/loss", "teacher/h", "h_grad"]


@settings(max_examples=20, deadline=None)
@given(names=st.permutations(NAMES))
def test_names_in_subgraphs_differ_from_those_of_enclosing_graphs(names):
    names = names[:3]
    body = BODY.format("o1", "o2", "o3")
    model = parse(
        f"g (float[N,4] x) => (float[N,4] y) {{ {body} }}", {"w": normal(4, 4), "zero": np.float32(0)}
    )
    expected = run(model)
    for graph, renames in zip(
        subgraphs(model.graph.node[3]), ({"o1": names[0], "o2": names[1]}, {"o3": names[2]}), strict=True
    ):
        for node in graph.node:
            node.input[:] = [renames.get(i, i) for i in node.input]
            node.output[:] = [renames.get(o, o) for o in node.output]
        graph.output[0].name = renames[graph.output[0].name]
    make_canonical(model)
    np.testing.assert_array_equal(run(model)[0], expected[0])
    around = set(defined(model.graph))
    inner = [name for graph in subgraphs(model.graph.node[3]) for name in defined(graph)]
    assert around.isdisjoint(inner)
    assert not any(name.startswith(("eptq/", "teacher/")) or name == "h_grad" for name in inner)
