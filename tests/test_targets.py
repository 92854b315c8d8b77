from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest
from conftest import MODELS
from graphs import images, silent, small_convnet
from pydantic import BaseModel

import eptq_onnx
from eptq_onnx import Config, ConfigError, targets
from eptq_onnx.cli.options import help_of
from eptq_onnx.numerics.scales import ScaleRule
from eptq_onnx.ops import check_roles
from eptq_onnx.ops.sizes import SIZES
from eptq_onnx.targets import Operator, Target


@pytest.mark.parametrize("name", targets.names())
def test_shipped_targets_name_operators_in_their_roles(name):
    target = targets.load(name)
    assert target.name == name
    check_roles(target)
    # Of another runtime than onnxruntime no kernels are counted.
    assert set(target.kernels) == (
        target.that_run("layer", "arithmetic") if target.verifier == "onnxruntime" else set()
    )
    assert all(target.kernels.values())


@pytest.mark.parametrize(
    ("op", "lines", "field"),
    [
        ("Softmaxx", 'runs = "float"', None),
        ("Elu", 'runs = "layer"', 'runs = "layer"'),
        ("Add", 'runs = "layer"', 'runs = "layer"'),
        ("Conv", 'runs = "arithmetic"', 'runs = "arithmetic"'),
        ("Relu", 'runs = "arithmetic"', 'runs = "arithmetic"'),
        ("Softmax", 'runs = "equal scale"', 'runs = "equal scale"'),
        ("Sigmoid", 'runs = "absorbed"', 'runs = "absorbed"'),
        ("Mul", 'inputs = "residual"', 'inputs = "residual"'),
        ("Add", "shared_scale = true", "shared_scale"),
        ("Conv", "computed = false", "computed"),
        ("Add", "weight.per_channel = true", "weight"),
        ("Slice", "stored = true", "stored"),
    ],
)
def test_a_field_is_for_operators_of_its_role(tmp_path, op, lines, field):
    target = targets.load(saved(tmp_path, HEAD + f"[operators.{op}]\n{lines}\n"))
    with pytest.raises(ConfigError) as caught:
        check_roles(target)
    expected = "is no operator of the operator table." if field is None else f"has {field}, which is for "
    assert str(caught.value).startswith(f"target mine: operators.{op} {expected}")
    assert str(caught.value).count("\n") == 0


def test_an_unknown_pattern_is_told(tmp_path):
    target = targets.load(saved(tmp_path, HEAD + 'patterns.keep = ["silu", "swoosh"]\n'))
    with pytest.raises(ConfigError, match=r"patterns.keep names 'swoosh': choose among silu, "):
        check_roles(target)


def test_every_size_that_a_target_may_limit_is_measured():
    assert set(get_args(targets.Size)) == set(SIZES)


def test_a_file_overrides_or_switches_off_one_operator(tmp_path):
    base = targets.load("ort-x64")
    text = """[operators]
        Sigmoid.runs = "float"
        Gemm.weight.per_channel = false
        Conv.least = { input_channels = 16 }
        Gather.stored = false
        """
    mine = targets.load(saved(tmp_path, HEAD + text))
    check_roles(mine)
    assert mine.that_run("arithmetic") == base.that_run("arithmetic") - {"Sigmoid"}
    assert set(mine.kernels) == set(base.kernels) - {"Sigmoid"}
    assert mine.operators["Conv"] == base.operators["Conv"].model_copy(
        update={"least": {"input_channels": 16}}
    )
    assert mine.operators["Gemm"].weight == base.weight.model_copy(update={"per_channel": False})
    assert mine.of("Gemm").weight_spec(8, 1).axis is None
    assert mine.of("Conv").weight_spec(8, 1).axis == 1
    others = base.operators.keys() - {"Sigmoid", "Gemm", "Conv", "Gather"}
    assert all(mine.operators[op] == base.operators[op] for op in others)


def test_rules_for_the_weights_of_an_operator_follow_those_of_the_file(tmp_path):
    saved(tmp_path, HEAD + "operators.Gemm.weight.per_channel = false\n", "first.toml")
    text = HEAD.replace("ort-x64", "first.toml") + "weight.range_8_bits = [-127, 127]\n"
    rules = targets.load(saved(tmp_path, text)).operators["Gemm"].weight
    assert rules is not None
    assert (rules.per_channel, rules.range_8_bits) == (False, (-127, 127))


def test_specs_stay_inside_the_container():
    target = targets.load("ort-x64")
    for bits in range(2, 9):
        weight, activation = target.weight_spec(bits, 0), target.activation_spec(bits)
        assert -128 <= weight.qmin < 0 < weight.qmax <= 127
        least, most = weight.zero_points
        assert weight.symmetric == (least == most == 0) == (bits >= 7)
        # With the zero point folded in, the integers stay in the range of the target.
        assert (weight.qmin - most, weight.qmax - least) == (-64, 63)
        assert (activation.qmin, activation.qmax) == (0, 2**bits - 1)
    depthwise = target.weight_spec(4, 0, depthwise=True)
    assert (depthwise.qmin - depthwise.zero_points[1], depthwise.qmax - depthwise.zero_points[0]) == (
        -127,
        127,
    )
    assert target.activation_spec(4).format.narrower_than_container
    assert not target.activation_spec(8).format.narrower_than_container


HEAD = 'name = "mine"\ntitle = "Mine"\nextends = "ort-x64"\n'


def saved(folder: Path, text: str, name: str = "mine.toml") -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


@pytest.mark.parametrize("low", [-128, -64, -20, -8, -3])
@pytest.mark.parametrize("high", [127, 63, 20, 7, 3])
@pytest.mark.parametrize("bits", range(2, 9))
def test_weights_of_any_width_stay_in_any_range(tmp_path, low, high, bits):
    spec = targets.load(saved(tmp_path, f"{HEAD}[weight]\nrange_8_bits = [{low}, {high}]\n")).weight_spec(
        bits, 0
    )
    least, most = spec.zero_points
    assert least <= 0 <= most
    assert low == spec.qmin - most < 0 < spec.qmax - least == high
    assert spec.qmax - spec.qmin < 2**bits


WRONG = {
    "unknown table": ("[colour]\nred = 1", "field colour is unknown"),
    "unknown field": ("[bias]\ncolour = 1", "field bias.colour is unknown"),
    "unknown rule": (
        '[weight]\nscale = "round"',
        "field weight.scale='round' is wrong: give any or power of two",
    ),
    "unsigned weights": ('[weight]\ncontainer = "uint8"', "weights are int8, because their zero point is 0"),
    "floats with zero points": (
        '[activation]\ncontainer = "float8e4m3fn"\nsymmetric = false',
        "float8e4m3fn has no zero point: its activations are symmetric",
    ),
    "integer biases of floats": (
        '[weight]\ncontainer = "float8e5m2"',
        "an integer bias has the scale of integer weights and activations: with float8e5m2, bias.integer is false",
    ),
    "unsigned and symmetric": ("[activation]\nsymmetric = true", "symmetric activations are int8"),
    "no type": (
        '[activation]\ncontainer = "int4"',
        "field activation.container='int4' is wrong: choose one of int8, uint8, float8e4m3fn, float8e5m2",
    ),
    "a range without negative integers": (
        "[weight]\nrange_8_bits = [0, 127]",
        "a range starts at -128 to -1",
    ),
    "a range beyond int8": (
        "[weight]\ndepthwise_range_8_bits = [-127, 128]",
        "a range starts at -128 to -1",
    ),
    "an old opset": ("min_opset = 12", "field min_opset=12 is wrong"),
    "an unknown role": (
        '[operators.Conv]\nruns = "layers"',
        "field operators.Conv.runs='layers' is wrong: give layer, arithmetic, equal scale, "
        "absorbed or float (did you mean layer?).",
    ),
    "a row without a role": ("[operators.Neg]\nkernels = []", "field operators.Neg.runs is missing"),
    "an unknown field of a row": ("[operators.Conv]\ncolour = 1", "field operators.Conv.colour is unknown"),
    "an unknown output": ('[operators.Conv]\noutput = "no"', "field operators.Conv.output='no' is wrong"),
    "an unknown size": ("[operators.Conv]\nleast.L = 3", "field operators.Conv.least.L"),
    "a size that is no number": (
        '[operators.Conv]\nleast.M = "x"',
        "field operators.Conv.least.M='x' is wrong",
    ),
    "a wrong rule for one operator": (
        "[operators.Conv.weight]\nrange_8_bits = [0, 127]",
        "a range starts at -128 to -1",
    ),
    "an unknown rule for one operator": (
        "[operators.Conv.weight]\ncolour = 1",
        "field operators.Conv.weight.colour is unknown",
    ),
    "rows that are no table": ("operators = 3", "field operators=3 is wrong"),
    "a row that is no table": ('[operators]\nConv = "layer"', "field operators.Conv='layer' is wrong"),
    "patterns that are no list": ("[patterns]\nkeep = 3", "field patterns.keep=3 is wrong"),
    "unknown outputs": ('outputs = "none"', "field outputs='none' is wrong"),
}


@pytest.mark.parametrize(("lines", "message"), WRONG.values(), ids=WRONG)
def test_what_makes_no_sense_is_told_in_a_sentence(tmp_path, lines, message):
    with pytest.raises(ConfigError) as caught:
        targets.load(saved(tmp_path, f"{HEAD}{lines}\n"))
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"target file {tmp_path / 'mine.toml'}: ")
    assert str(caught.value).count("\n") == 0


def test_a_target_takes_what_it_does_not_say_from_another(tmp_path):
    base = targets.load("ort-x64")
    (tmp_path / "base").mkdir()
    saved(
        tmp_path / "base",
        HEAD + 'activation.scale = "power of two"\noperators.Clip.runs = "float"\n',
        "first.toml",
    )
    text = 'name = "second"\ntitle = "Second"\nextends = "base/first.toml"\nbias.integer = false\nverifier = "none"\n'
    second = targets.load(saved(tmp_path, text))
    assert (second.name, second.title) == ("second", "Second")
    assert second.activation == base.activation.model_copy(update={"scale": ScaleRule.POWER_OF_TWO})
    assert second.that_run("absorbed") == {"Relu"}
    assert second.that_run("layer") == base.that_run("layer")
    assert second.weight == base.weight
    assert not second.bias.integer
    assert second.kernels == {}
    assert second.activation_spec(8).scales is ScaleRule.POWER_OF_TWO


@pytest.mark.parametrize("field", ["name", "title"])
def test_a_target_has_a_name_and_a_title_of_its_own(tmp_path, field):
    text = "".join(line for line in HEAD.splitlines(keepends=True) if not line.startswith(field))
    with pytest.raises(ConfigError, match=f"field {field} is missing"):
        targets.load(saved(tmp_path, text))


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("toaster", "extends 'toaster', which is unknown: choose one of "),
        (3, "extends 3, which is unknown"),
        ("other.toml", "extends other.toml, which does not exist"),
        ("mine.toml", "extends mine.toml, which extends it in turn"),
        ("back.toml", "target file back.toml extends mine.toml, which extends it in turn"),
        ("bad.toml", "target file bad.toml is not valid TOML"),
        ("binary.toml", "target file binary.toml is not valid TOML"),
    ],
)
def test_what_cannot_be_extended_is_told_in_a_sentence(tmp_path, base, message):
    saved(tmp_path, HEAD.replace("ort-x64", "mine.toml"), "back.toml")
    saved(tmp_path, "name =", "bad.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError) as caught:
        targets.load(saved(tmp_path, HEAD.replace('"ort-x64"', repr(base).replace("'", '"'))))
    assert message in str(caught.value)
    assert str(caught.value).count("\n") == 0


def test_rules_count_in_the_hash_of_options_and_their_absence_does_not(tmp_path):
    plain = targets.load("ort-x64")
    powers = targets.load(saved(tmp_path, HEAD + 'weight.scale = "power of two"\n'))
    same = targets.load(saved(tmp_path, HEAD + 'weight.scale = "any"\n'))
    hashes = [
        Config().digest(t.model_copy(update={"name": "a", "title": "a"})) for t in (plain, same, powers)
    ]
    assert hashes[0] == hashes[1] != hashes[2]


def test_all_fields_are_described():
    page = (MODELS.parent / "docs" / "targets.md").read_text(encoding="utf-8")
    # Without the tables that are made from the code.
    page = re.sub(r"<!-- the (?!code).*?<!-- the code .*?-->", "", page, flags=re.DOTALL)
    described = set(re.findall(r"`([\w.]+)`", " ".join(re.findall(r"^\| (`.*?`) \|", page, re.MULTILINE))))
    fields = {"extends", *Operator.model_fields}
    for name, field in Target.model_fields.items():
        whole = (
            field.annotation
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
            else None
        )
        fields |= {name} if whole is None else {f"{name}.{inner}" for inner in whole.model_fields}
    assert fields == described - {"mine.toml"}
    for value in get_args(targets.Runs):
        assert f'| `"{value}"` |' in page
    for size in get_args(targets.Size):
        assert f"`{size}`" in page


@pytest.mark.parametrize("name", targets.names())
def test_the_page_and_the_help_have_all_shipped_targets(monkeypatch, name):
    monkeypatch.syspath_prepend(MODELS.parent / "tools")
    import pages

    source = (MODELS.parent / "docs" / "targets.md").read_text(encoding="utf-8")
    page = pages.on_page_markdown(source)
    [place] = [place for place, make in pages.PLACES.items() if make is pages.shipped_targets]
    assert place in source
    assert place not in page
    assert f"| `{name}` | {targets.load(name).title} | " in page
    assert '`"silu"`' in page
    assert pages.on_page_markdown("# Other") == "# Other"
    assert name in help_of("target", Config.model_fields["target"])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"storage": "packed"}, "storage=packed is not for target tensorrt, which does not unpack weights"),
        ({"storage": "native"}, "storage=native is not for target tensorrt"),
        (
            {"activation_bits": 4},
            "target tensorrt does not support 4-bit activations, because it takes no Clip",
        ),
        ({"bits": "op:Conv=w8a6"}, "target tensorrt does not support 6-bit activations"),
        (
            {"target": "tensorrt-fp8", "weight_bits": 4},
            "target tensorrt-fp8 does not support 4-bit weights, because its weights are float8e4m3fn",
        ),
        ({"target": "tensorrt-fp8", "edge_bits": 6}, "tensorrt-fp8 does not support 6-bit weights"),
        (
            {"target": "tensorrt-fp8", "activation_bits": 16},
            "tensorrt-fp8 does not support 16-bit activations",
        ),
        ({"target": "tensorrt-fp8", "budget": "weights=4"}, "option budget is not for target tensorrt-fp8"),
        (
            {"target": "tensorrt-fp8", "objective": "bytes"},
            "option objective=bytes is not for target tensorrt-fp8",
        ),
    ],
)
def test_what_a_runtime_does_not_read_is_refused(options, sentence):
    with pytest.raises(ConfigError, match=sentence):
        eptq_onnx.quantize(
            small_convnet(), images(8), Config(**{"target": "tensorrt", "preset": "fast", **options})
        )


@pytest.mark.parametrize(("target", "told"), [("tensorrt", True), ("ort-x64", False)])
def test_weights_stay_int8_where_nothing_unfolds_them(target, told):
    config = Config(target=target, preset="fast", weight_bits=4, edge_bits=4)
    report = eptq_onnx.quantize(small_convnet(), images(8), config, progress=silent).report
    assert any("does not unpack packed weights" in note for note in report.notes) == told
