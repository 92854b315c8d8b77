"""What onnxruntime loads is quantized whole, with the inputs and outputs it had."""

import numpy as np
import onnx
import pytest
from graphs import normal
from onnx import FunctionProto, NodeProto, TensorProto, helper, numpy_helper

from eptq_onnx import Config, quantize
from eptq_onnx.runtime import Session

pytestmark = pytest.mark.once

SAMPLES = 48
RNG = np.random.default_rng(3)
WEIGHTS = {
    "w": (RNG.normal(size=(12, 16)) / 3).astype(np.float32),
    "b": (RNG.normal(size=16) / 5).astype(np.float32),
    "v": (RNG.normal(size=(16, 5)) / 3).astype(np.float32),
    "c": (RNG.normal(size=5) / 5).astype(np.float32),
}


def perceptron(*, elem_type=TensorProto.FLOAT, middle=None, nodes=(), outputs=(), opset=17):
    """Two layers with a Relu, or another node from ``m`` to ``r``, between them."""
    dtype = helper.tensor_dtype_to_np_dtype(elem_type)
    body = [
        helper.make_node("Gemm", ["x", "w", "b"], ["m"], "first"),
        middle or helper.make_node("Relu", ["m"], ["r"], "middle"),
        helper.make_node("Gemm", ["r", "v", "c"], ["y"], "second"),
    ]
    graph = helper.make_graph(
        [*body, *nodes],
        "perceptron",
        [helper.make_tensor_value_info("x", elem_type, ["n", 12])],
        [helper.make_tensor_value_info("y", elem_type, ["n", 5]), *outputs],
        [numpy_helper.from_array(value.astype(dtype), name) for name, value in WEIGHTS.items()],
    )
    opsets = [helper.make_opsetid(domain, version) for domain, version in (("", opset), ("ai.onnx.ml", 2))]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def feeds_of(model):
    dtype = helper.tensor_dtype_to_np_dtype(model.graph.input[0].type.tensor_type.elem_type)
    return {"x": normal(SAMPLES, 12, seed=8, scale=1.0).astype(dtype)}


def flat(value):
    if isinstance(value, (list, dict)):
        values = value.values() if isinstance(value, dict) else value
        return np.concatenate([flat(v) for v in values])
    return np.asarray(value).reshape(-1)


def check(model, *, preset="fast", steps=None, least=22.0):
    """Quantize, and compare all outputs of floats with those of the float model."""
    options = {} if steps is None else {"steps": steps}
    feeds = feeds_of(model)
    result = quantize(model, feeds, Config(preset=preset, **options))
    assert len(result.report.layers) == 2
    assert [i.name for i in result.model.graph.input] == [i.name for i in model.graph.input]
    before, after = Session(model), Session(result.model)
    kinds = [[(name, kind) for name, kind, _ in session.signature] for session in (before, after)]
    assert kinds[0] == kinds[1]
    written = after.run(feeds)
    for name, value in before.run(feeds).items():
        got, wanted = flat(written[name]), flat(value)
        if wanted.dtype.kind == "f":
            power, noise = np.square(wanted.astype(float)).sum(), np.square(wanted.astype(float) - got).sum()
            assert power >= noise * 10 ** (least / 10), name
        else:
            assert got.shape == wanted.shape
            assert np.mean(got == wanted) > 0.9
    return result


def with_sequence(elem_type=TensorProto.FLOAT):
    node = helper.make_node("SequenceConstruct", ["r", "y"], ["s"])
    return perceptron(
        elem_type=elem_type,
        nodes=[node],
        outputs=[helper.make_tensor_sequence_value_info("s", elem_type, None)],
    )


def with_optional():
    kind = helper.make_optional_type_proto(helper.make_tensor_type_proto(TensorProto.FLOAT, None))
    return perceptron(
        nodes=[helper.make_node("Optional", ["y"], ["o"])], outputs=[helper.make_value_info("o", kind)]
    )


def with_maps():
    kind = helper.make_map_type_proto(
        TensorProto.STRING, helper.make_tensor_type_proto(TensorProto.FLOAT, [])
    )
    node = helper.make_node("ZipMap", ["y"], ["maps"], domain="ai.onnx.ml", classlabels_strings=list("abcde"))
    return perceptron(
        nodes=[node], outputs=[helper.make_value_info("maps", helper.make_sequence_type_proto(kind))]
    )


def with_labels():
    model = perceptron(
        nodes=[
            helper.make_node("ArgMax", ["y"], ["best"], axis=1, keepdims=0),
            helper.make_node("Gather", ["names", "best"], ["label"]),
        ],
        outputs=[helper.make_tensor_value_info("label", TensorProto.STRING, None)],
    )
    model.graph.initializer.append(numpy_helper.from_array(np.array(list("abcde"), object), "names"))
    return model


def with_sequence_between_layers():
    model = perceptron()
    made = [
        helper.make_node("SplitToSequence", ["m"], ["parts"], axis=1),
        helper.make_node("ConcatFromSequence", ["parts"], ["joined"], axis=1),
        helper.make_node("Relu", ["joined"], ["r"]),
    ]
    nodes = [model.graph.node[0], *made, model.graph.node[2]]
    nodes = [NodeProto.FromString(n.SerializeToString()) for n in nodes]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def with_input_as_output():
    model = perceptron()
    model.graph.output.append(model.graph.input[0])
    return model


def with_constant_as_output():
    model = perceptron()
    model.graph.output.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [12, 16]))
    return model


def with_output_twice():
    model = perceptron()
    model.graph.output.append(model.graph.output[0])
    return model


def without_shapes():
    model = perceptron()
    for info in (*model.graph.input, *model.graph.output):
        info.type.tensor_type.ClearField("shape")
    return model


def with_operator_of_unknown_rank():
    return perceptron(
        middle=helper.make_node("Normalizer", ["m"], ["r"], "middle", domain="ai.onnx.ml", norm="L2")
    )


def in_a_function():
    """The layers in a local function whose names are those around it."""
    model = perceptron()
    nodes = [NodeProto.FromString(n.SerializeToString()) for n in model.graph.node]
    function = FunctionProto(name="Body", domain="own")
    function.input.extend(["x", *WEIGHTS])
    function.output.append("y")
    function.node.extend(nodes)
    function.opset_import.add(domain="", version=17)
    model.functions.append(function)
    model.opset_import.add(domain="own", version=1)
    del model.graph.node[:]
    model.graph.node.append(helper.make_node("Body", ["x", *WEIGHTS], ["y"], "call", domain="own"))
    return model


VARIANTS = {
    "a sequence": with_sequence,
    "a sequence of halves": lambda: with_sequence(TensorProto.FLOAT16),
    "a sequence of doubles": lambda: with_sequence(TensorProto.DOUBLE),
    "an optional": with_optional,
    "maps": with_maps,
    "labels": with_labels,
    "a sequence between layers": with_sequence_between_layers,
    "an input as output": with_input_as_output,
    "a constant as output": with_constant_as_output,
    "an output twice": with_output_twice,
    "no shapes": without_shapes,
    "an operator of unknown rank": with_operator_of_unknown_rank,
    "a function": in_a_function,
    "doubles": lambda: perceptron(elem_type=TensorProto.DOUBLE),
    "halves": lambda: perceptron(elem_type=TensorProto.FLOAT16),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_models_with_such_inputs_and_outputs_are_quantized(variant):
    check(VARIANTS[variant]())


@pytest.mark.parametrize(
    "variant", ["a sequence of halves", "maps", "an input as output", "an operator of unknown rank"]
)
def test_they_are_optimized_as_a_whole(variant):
    result = check(VARIANTS[variant](), preset="balanced", steps=20)
    assert result.report.optimization is not None


def taken_names(model):
    """The names of the tensors of a quantized model, but its inputs and outputs, and those that steps
    make."""
    kept = {i.name for i in (*model.graph.input, *model.graph.output)}
    names = (
        {o for n in model.graph.node for o in n.output}
        | {n.name for n in model.graph.node}
        | {t.name for t in model.graph.initializer}
    )
    steps = [
        "eptq/loss",
        "eptq/errors",
        "eptq/scale_0",
        "teacher/m",
        "closed_form/constant",
        "float32/constant",
        "constant",
        "m_grad",
    ]
    return sorted(names - kept) + steps


def branched():
    """Two layers, and in front of the second an If that reads what the first makes."""

    def branch(name, *ops):
        nodes, last = [], "m"
        for k, op in enumerate(ops):
            nodes.append(helper.make_node(op, [last], [f"{name}_{k}"], f"{name}_node_{k}"))
            last = f"{name}_{k}"
        return helper.make_graph(
            nodes, name, [], [helper.make_tensor_value_info(last, TensorProto.FLOAT, None)]
        )

    sides = {"then_branch": branch("a", "Abs", "Relu"), "else_branch": branch("z", "Relu", "Tanh", "Neg")}
    model = perceptron(middle=helper.make_node("If", ["flag"], ["r"], "middle", **sides))
    start = [
        helper.make_node("ReduceMax", ["x"], ["most"], keepdims=0),
        helper.make_node("Greater", ["most", "limit"], ["flag"]),
    ]
    model.graph.initializer.append(numpy_helper.from_array(np.array(1.5, np.float32), "limit"))
    nodes = [NodeProto.FromString(n.SerializeToString()) for n in (*start, *model.graph.node)]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def graphs_of(graph):
    yield graph
    for node in graph.node:
        for item in node.attribute:
            if item.type == onnx.AttributeProto.GRAPH:
                yield from graphs_of(item.g)


def renamed_with(model, draw, names):
    """The model with other names for its inner tensors and its nodes, no two alike."""
    own = {o for graph in graphs_of(model.graph) for n in graph.node for o in (*n.output, n.name)}
    names = [
        name
        for name in draw.permutation(names)
        if name not in own | {t.name for t in model.graph.initializer}
    ]
    kept = {i.name for i in (*model.graph.input, *model.graph.output)}
    new = dict.fromkeys(kept)
    for graph in graphs_of(model.graph):
        for tensor in (*(t.name for t in graph.initializer), *(o for n in graph.node for o in n.output)):
            if tensor not in new and names and draw.random() < 0.8:
                new[tensor] = names.pop()
    for graph in graphs_of(model.graph):
        for item in (*graph.initializer, *graph.output, *graph.value_info):
            item.name = new.get(item.name) or item.name
        for node in graph.node:
            node.input[:] = [new.get(i) or i for i in node.input]
            node.output[:] = [new.get(o) or o for o in node.output]
            node.name = names.pop() if names and draw.random() < 0.5 else ""
    return model


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("make", [perceptron, branched])
def test_generated_names_never_meet_names_of_the_model(make, seed):
    draw = np.random.default_rng(seed)
    plain = quantize(make(), feeds_of(make()), Config(preset="fast")).model
    model = renamed_with(make(), draw, taken_names(plain))
    # Once more: the names that a quantizer of this model would give.
    again = quantize(model, feeds_of(model), Config(preset="fast")).model
    model = renamed_with(make(), draw, taken_names(again))
    check(model, least=20)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("make", [perceptron, branched])
def test_names_of_training_graphs_do_not_either(make, seed):
    plain = quantize(make(), feeds_of(make()), Config(preset="fast")).model
    model = renamed_with(make(), np.random.default_rng(seed), taken_names(plain))
    assert check(model, preset="balanced", steps=20, least=20).report.optimization is not None
