from __future__ import annotations

import os
import time

import numpy as np
import onnx
import psutil
import pytest
from graphs import images, normal, parse, small_convnet
from onnx import ModelProto, TensorProto, helper, numpy_helper

from eptq_onnx import ModelError
from eptq_onnx.graph import io
from eptq_onnx.graph.check import labelled_tensors
from eptq_onnx.proto import store
from eptq_onnx.runtime import Session

W = normal(3, 4)
X = normal(2, 3, seed=1)


def plain() -> ModelProto:
    return parse("g (float[N,3] x) => (float[N,4] y) { y = MatMul (x, w) }", {"w": W})


def in_a_body() -> ModelProto:
    return parse("""g (float[N,3] x) => (float[N,4] y) {
        c = Constant <value = bool {1}> ()
        y = If (c) <
            then_branch = t () => (float[N,4] a) <float[3,4] w = {1,2,3,4,5,6,7,8,9,10,11,12}> {
                a = MatMul (x, w)
            },
            else_branch = e () => (float[N,4] b) {
                k = Constant <value = float[3,4] {1,2,3,4,5,6,7,8,9,10,11,12}> ()
                b = MatMul (x, k)
            }
        >
    }""")


def in_an_attribute() -> ModelProto:
    return parse(
        "g (float[N,3] x) => (float[N,4] y) "
        "{ w = Constant <value = float[3,4] {1,2,3,4,5,6,7,8,9,10,11,12}> ()  y = MatMul (x, w) }"
    )


def in_a_function() -> ModelProto:
    return onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17, "f" : 1]>
        g (float[N,3] x) => (float[N,4] y) { y = f.linear (x) }
        <domain: "f", opset_import: ["" : 17]>
        linear (x) => (y) {
            w = Constant <value = float[3,4] {1,2,3,4,5,6,7,8,9,10,11,12}> ()
            y = MatMul (x, w)
        }
    """)


def sparse() -> ModelProto:
    model = plain()
    del model.graph.initializer[:]
    values = numpy_helper.from_array(np.arange(1, 13, dtype=np.float32), "w")
    model.graph.sparse_initializer.append(
        helper.make_sparse_tensor(values, numpy_helper.from_array(np.arange(12), "i"), [3, 4])
    )
    return model


PLACES = [plain, in_a_body, in_an_attribute, in_a_function, sparse]


def weights(model):
    found = [t for _, t in labelled_tensors(model) if t.data_type == TensorProto.FLOAT]
    assert found
    return found


def moved_out(model, folder, location="m.data", place=None):
    """Write a model to a file in the folder, and its weights to another file."""
    for tensor in weights(model):
        value = numpy_helper.to_array(tensor)
        (place or folder / location).write_bytes(bytes(64) + value.tobytes())
        reference = store.reference(
            tensor.name, 1, value.shape, {"location": location, "offset": 64, "length": value.nbytes}
        )
        tensor.CopyFrom(reference)
    path = folder / "m.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def run(model):
    return Session(model).run({"x": X})["y"]


# ---- external data -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("make", PLACES)
@pytest.mark.parametrize("location", ["m.data", "./m.data", "sub/m.data", "sub/../m.data"])
def test_external_data_below_the_folder_is_read_for_all_kinds_of_tensors(tmp_path, make, location):
    (tmp_path / "sub").mkdir()
    np.testing.assert_array_equal(run(io.load(moved_out(make(), tmp_path, location))), run(io.load(make())))


@pytest.mark.parametrize("make", PLACES)
@pytest.mark.parametrize(
    "kind",
    [
        "up",
        "up and down",
        "absolute",
        "absolute inside",
        "link",
        "link of a folder",
        "pipe",
        "folder",
        "backslash drive",
    ],
)
def test_external_data_outside_the_folder_is_refused(tmp_path, make, kind):
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    outside = tmp_path / "secret"
    locations = {
        "up": "../secret",
        "up and down": "sub/../../secret",
        "absolute": str(outside),
        "absolute inside": str(folder / "m.data"),
    }
    location = locations.get(kind, "m.data")
    if kind == "link":
        (folder / "m.data").symlink_to(outside)
    elif kind == "link of a folder":
        (folder / "linked").symlink_to(tmp_path)
        location = "linked/secret"
    elif kind == "pipe":
        os.mkfifo(folder / "m.data")
    elif kind == "folder":
        location = "sub"
    elif kind == "backslash drive":
        location = "C:\\secret"
    path = moved_out(make(), folder, location, outside)
    with pytest.raises(
        ModelError,
        match=r"external data of .*m\.onnx cannot be read: .*(not below the model's folder|is not a file)",
    ):
        io.load(path)


def test_a_cache_of_links_to_one_folder_is_read(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    moved_out(plain(), tmp_path / "blobs")
    for name in ("m.onnx", "m.data"):
        (tmp_path / "snapshot" / name).symlink_to(tmp_path / "blobs" / name)
    np.testing.assert_array_equal(run(io.load(tmp_path / "snapshot" / "m.onnx")), run(plain()))


@pytest.mark.parametrize("make", PLACES)
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("offset", "65"), ("offset", "-4"), ("offset", "99999999999999999999999"),
        ("offset", "9000000000000000000"), ("offset", "abc"), ("offset", "1_0"), ("length", "-1"),
        ("length", "47"), ("length", "49"), ("length", "9000000000000000000"), ("length", "0x30"),
        ("location", ""), ("location", "none.data"), ("location", "a\0b"), ("location", "x" * 5000),
    ],
)  # fmt: skip
def test_invalid_offsets_and_lengths_are_refused(tmp_path, make, key, value):
    path = moved_out(make(), tmp_path)
    model = onnx.load(path, load_external_data=False)
    for tensor in weights(model):
        next(e for e in tensor.external_data if e.key == key).value = value
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match=r"external data of .*m\.onnx cannot be read") as e:
        io.load(path)
    assert len(str(e.value)) < 600


@pytest.mark.parametrize("length", [None, "0", " 48"])
def test_the_length_is_optional_and_the_file_may_be_longer(tmp_path, length):
    path = moved_out(plain(), tmp_path)
    with open(tmp_path / "m.data", "ab") as file:
        file.write(bytes(1000))
    model = onnx.load(path, load_external_data=False)
    entries = model.graph.initializer[0].external_data
    del entries[2]
    if length is not None:
        entries.add(key="length", value=length)
    path.write_bytes(model.SerializeToString())
    np.testing.assert_array_equal(run(io.load(path)), run(plain()))


def test_the_memory_for_repeated_reads_of_one_file_is_bounded(tmp_path, monkeypatch):
    path = moved_out(plain(), tmp_path)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 47}))
    with pytest.raises(ModelError, match="takes 48 bytes, and 47 are free in memory"):
        io.load(path)


def test_unread_external_data_may_be_missing_but_not_outside(tmp_path):
    for location, fits in (("none.data", True), ("../none.data", False)):
        model = plain()
        model.graph.initializer.append(store.reference("spare", 1, [5], {"location": location}))
        path = tmp_path / "m.onnx"
        path.write_bytes(model.SerializeToString())
        if fits:
            np.testing.assert_array_equal(run(io.load(path)), run(plain()))
        else:
            with pytest.raises(ModelError, match="not below the model's folder"):
                io.load(path)


# ---- tensors -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("make", PLACES)
@pytest.mark.parametrize(
    ("dims", "data_type"),
    [
        ([3, 5], 1), ([2, 4], 1), ([-3, -4], 1), ([3, -4], 1), ([2**40, 2**40], 1), ([2**62, 4], 1),
        ([2**63 - 1] * 4, 1), ([3, 4], 99), ([3, 4], 0), ([3, 4], -7), ([3, 4], 11), ([3, 4], 8),
        ([0, 2**62, 2**62], 1),
    ],
)  # fmt: skip
def test_shapes_and_types_that_do_not_fit_the_data_are_refused(make, dims, data_type):
    model = make()
    for tensor in weights(model):
        tensor.dims[:] = dims
        tensor.data_type = data_type
    before = model.SerializeToString()
    with pytest.raises(
        ModelError,
        match=r"^the model is not valid ONNX: the .*(instead of|which no|which does not|negative shape).*\.$",
    ):
        io.load(model)
    assert model.SerializeToString() == before


def test_a_sparse_tensor_of_absurd_size_is_refused():
    for dims in ([2**40, 2**40], [-3, 4], [2**63 - 1, 2**63 - 1]):
        model = sparse()
        model.graph.sparse_initializer[0].dims[:] = dims
        with pytest.raises(ModelError, match="the sparse tensor w"):
            io.load(model)


def test_parts_that_onnxruntime_ignores_are_removed():
    model = plain()
    weight = model.graph.initializer[0]
    weight.float_data.extend([1.0] * 3)
    weight.int32_data.append(1)
    weight.segment.begin = 1
    model.graph.initializer.append(TensorProto(name="spare", data_type=1, dims=[-3, 10**9], raw_data=b"12"))
    model.graph.initializer.append(TensorProto(name="spare2", data_type=1, dims=[10**15], float_data=[1.0]))
    model.graph.value_info.append(helper.make_tensor_value_info("nobody", 99, [2]))
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = -7
    model.opset_import.append(helper.make_opsetid("nobody", 2**60))
    model.opset_import.append(helper.make_opsetid("nobody.either", -5))
    expected = run(model)
    before = model.SerializeToString()
    for source in (model, before):
        loaded = io.load(source)
        assert [t.name for t in loaded.graph.initializer] == ["w"]
        np.testing.assert_array_equal(run(loaded), expected)
    assert model.SerializeToString() == before


@pytest.mark.parametrize("number", [99, -1, 0])
@pytest.mark.parametrize("which", ["input", "output"])
def test_inputs_and_outputs_of_no_type_are_refused(which, number):
    model = plain()
    getattr(model.graph, which)[0].type.tensor_type.elem_type = number
    with pytest.raises(ModelError, match=f"has the element type {number}, which does not exist"):
        io.load(model)


@pytest.mark.parametrize("number", [99, -1, 0, 2**31 - 1])
@pytest.mark.parametrize(
    ("which", "place"), [("input", 0), ("input", 1), ("input", 2), ("output", 0), ("output", 1)]
)
def test_inputs_and_outputs_of_bodies_have_types_that_exist(which, place, number):
    model = parse("""g (float[N,4] x, int64 n, bool q) => (float[N,4] y) {
        y = Loop (n, q, x) <body = t (int64 i, bool c, float[N,4] v) => (bool d, float[N,4] a) {
            a = Relu (v)  d = Identity (c)
        }>
    }""")
    io.load(model)
    body = model.graph.node[0].attribute[0].g
    getattr(body, which)[place].type.tensor_type.elem_type = number
    with pytest.raises(ModelError, match=f"has the element type {number}, which does not exist"):
        io.load(model)


@pytest.mark.parametrize("version", [-1, 0, 2**31, 2**62, 10**6])
def test_versions_that_do_not_exist_are_refused(version):
    model = plain()
    model.opset_import[0].version = version
    with pytest.raises(ModelError, match="is not valid ONNX"):
        io.load(model)
    model = plain()
    model.ir_version = max(version, 99)
    with pytest.raises(ModelError, match="is not valid ONNX"):
        io.load(model)


# ---- names -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("y = MatMul (x, nowhere)", r"the node y \(MatMul\) reads the tensor nowhere, which nothing defines"),
        ("a = Add (x, b)  b = Add (a, x)  y = MatMul (b, w)", "in a cycle"),
        ("a = Add (x, a)  y = MatMul (a, w)", "in a cycle"),
        ("y = MatMul (x, w)  y = MatMul (x, w)", "defines the tensor y, which exists already"),
        ("y = MatMul (x, w)  w = Relu (x)", "defines the tensor w, which exists already"),
        ("y = MatMul (x, w)  x = Relu (x)", "defines the tensor x, which exists already"),
        ("z = MatMul (x, w)", "the output y of the graph g is not defined"),
    ],
)
@pytest.mark.parametrize("inside", [False, True])
def test_undefined_and_redefined_names_are_reported(body, message, inside):
    if inside:
        message = message.replace("output y of the graph g", "output y of the graph t")
        text = f"""g (float[N,3] x0) => (float[N,4] r) {{
            c = Constant <value = bool {{1}}> ()
            o = Constant <value = float[3,4] {{1,2,3,4,5,6,7,8,9,10,11,12}}> ()
            r = If (c) <
                then_branch = t () => (float[N,4] y)
                    <float[3,4] w = {{1,2,3,4,5,6,7,8,9,10,11,12}},
                     float[2,3] x = {{1,2,3,4,5,6}}> {{ {body} }},
                else_branch = e () => (float[N,4] b) {{ b = MatMul (x0, o) }}
            >
        }}"""
        model = parse(text)
    else:
        model = parse(f"g (float[N,3] x) => (float[N,4] y) {{ {body} }}", {"w": W})
    with pytest.raises(ModelError, match=message):
        io.load(model)


@pytest.mark.parametrize("field", ["node", "tensor", "doc", "attribute", "body"])
def test_invalid_utf8_in_names_is_escaped(field):
    model = in_a_body()
    node = model.graph.node[1]
    if field == "node":
        node.name = "QZXQ"
    elif field == "tensor":
        node.input[0] = model.graph.node[0].output[0] = "QZXQ"
    elif field == "doc":
        model.doc_string = node.doc_string = "QZXQ"
    elif field == "attribute":
        node.attribute[0].doc_string = "QZXQ"
    else:
        node.attribute[0].g.node[0].output[0] = node.attribute[0].g.output[0].name = "QZXQ"
    expected = run(model)
    loaded = io.load(model.SerializeToString().replace(b"QZXQ", b"Q\xff\xfeQ"))
    assert b"\xff\xfe" not in loaded.SerializeToString()
    assert rb"Q\xff\xfeQ" in loaded.SerializeToString()
    np.testing.assert_array_equal(run(loaded), expected)


@pytest.mark.parametrize("which", ["x", "y"])
def test_inputs_and_outputs_with_invalid_utf8_names_are_refused(which):
    text = "g (float[N,3] x) => (float[N,4] y) { y = MatMul (x, w) }".replace(which, "QZXQ")
    data = parse(text, {"w": W}).SerializeToString().replace(b"QZXQ", b"Q\xff\xfeQ")
    with pytest.raises(ModelError, match=r"name b'Q\\xff\\xfeQ' is not valid UTF-8"):
        io.load(data)


# ---- nesting -----------------------------------------------------------------------------------------------
def nested(depth):
    """Return a model with nested subgraphs, built from the outermost one on.

    protobuf does not copy messages that are nested too deep.
    """
    model = plain()
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "c"))
    graph = model.graph
    for k in range(depth):
        del graph.node[:]
        node = graph.node.add(op_type="If", name=f"if{k}", input=["c"], output=[graph.output[0].name])
        for name in ("else_branch", "then_branch"):
            graph = node.attribute.add(name=name, type=onnx.AttributeProto.GRAPH).g
            graph.name = f"{name}{k}"
            graph.output.append(helper.make_tensor_value_info(f"{name}{k}_y", 1, None))
            graph.node.add(op_type="MatMul", input=["x", "w"], output=[f"{name}{k}_y"])
    return model


@pytest.mark.parametrize("depth", [29, 40, 400, 3000])
def test_excessive_nesting_is_refused_at_once(depth):
    model = nested(depth)
    begin = time.monotonic()
    with pytest.raises(ModelError, match=r"nested more than (16|28) deep"):
        io.load(model)
    assert time.monotonic() - begin < 2


@pytest.mark.parametrize("depth", [1, 5, 12])
def test_moderate_nesting_is_loaded(depth):
    np.testing.assert_array_equal(run(io.load(nested(depth))), run(plain()))


def calling(calls):
    """Return a model whose functions call those with the given indices."""
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("d", 1)]
    functions = []
    for k, called in enumerate(calls):
        names = ["a", *(f"t{i}" for i in range(len(called)))]
        nodes = [
            helper.make_node(f"f{c}", [names[i]], [names[i + 1]], domain="d") for i, c in enumerate(called)
        ]
        functions.append(
            helper.make_function(
                "d", f"f{k}", ["a"], ["b"], [*nodes, helper.make_node("Relu", [names[-1]], ["b"])], imports
            )
        )
    model = plain()
    model.graph.node[0].input[0] = "z"
    model.graph.node.add(op_type="f0", domain="d", input=["x"], output=["z"])
    model.functions.extend(functions)
    model.opset_import.add(domain="d", version=1)
    return model


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        ([[0]], "call each other without end"),
        ([[1], [2], [0]], "call each other without end"),
        ([[k + 1] for k in range(3000)] + [[]], "more than 100 nested function calls"),
        ([[k + 1] * 2 for k in range(40)] + [[]], "nodes once its functions are inlined"),
        ([[k + 1] * 20 for k in range(5)] + [[]], "nodes once its functions are inlined"),
    ],
)
def test_recursive_and_exploding_functions_are_refused_at_once(calls, message):
    begin = time.monotonic()
    with pytest.raises(ModelError, match=message):
        io.load(calling(calls))
    assert time.monotonic() - begin < 2


def test_functions_that_call_others_are_loaded():
    model = calling([[1, 2], [2], []])
    np.testing.assert_array_equal(run(io.load(model)), run(model))


@pytest.mark.parametrize("fault", ["no name", "unknown operator", "no opset"])
def test_unused_functions_are_removed(fault):
    model = calling([[1], []])
    odd = model.functions.add(domain="d", name="" if fault == "no name" else "odd")
    if fault != "no opset":
        odd.opset_import.add(domain="d", version=1)
    if fault == "unknown operator":
        odd.input.append("a")
        odd.output.append("b")
        odd.node.add(op_type="Nothing", domain="d", input=["a"], output=["b"])
    loaded = io.load(model)
    assert [f.name for f in loaded.functions] == ["f0", "f1"]
    np.testing.assert_array_equal(run(loaded), run(calling([[1], []])))


# ---- cost --------------------------------------------------------------------------------------------------
def test_external_data_is_read_once(tmp_path, monkeypatch):
    onnx.save(
        small_convnet(), tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0
    )
    read = []
    parts = store.Place.parts

    def counted(place):
        for part in parts(place):
            read.append(len(part))
            yield part

    monkeypatch.setattr(store.Place, "parts", counted)
    loaded = io.load(tmp_path / "m.onnx")
    assert sum(read) == sum(numpy_helper.to_array(t).nbytes for t in small_convnet().graph.initializer)
    np.testing.assert_array_equal(
        Session(loaded).run({"image": images(2)})["logits"],
        Session(small_convnet()).run({"image": images(2)})["logits"],
    )
