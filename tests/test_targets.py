from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import MODELS
from pydantic import BaseModel

from eptq_onnx import Config, ConfigError, targets
from eptq_onnx.cli.options import help_of
from eptq_onnx.numerics.scales import ScaleRule
from eptq_onnx.ops import TABLE, Role, check_roles
from eptq_onnx.targets import OpRules, Target


@pytest.mark.parametrize("name", targets.names())
def test_shipped_targets_name_operators_in_their_roles(name):
    target = targets.load(name)
    roles = {op: row.role for (_, op), row in TABLE.items()}
    assert target.name == name
    assert {roles[op] for op in target.ops.layers} == {Role.LAYER}
    assert {roles[op] for op in target.ops.arithmetic} == {Role.ARITHMETIC}
    assert {roles[op] for op in target.ops.equal_scale} == {Role.EQUAL_SCALE}
    assert {roles[op] for op in target.ops.absorbed} == {Role.CLIPPING}
    assert target.ops.float_output <= target.ops.layers
    # Of another runtime than onnxruntime no kernels are counted.
    assert not target.kernels or set(target.kernels) == target.ops.layers | target.ops.arithmetic


@pytest.mark.parametrize(
    "name", ["layers", "arithmetic", "equal_scale", "absorbed", "float_output", "stored"]
)
@pytest.mark.parametrize("wrong", ["Softmaxx", "Elu", "Conv"])
def test_a_list_holds_only_operators_of_its_role(tmp_path, name, wrong):
    wrong = "Add" if wrong == "Conv" and name in ("layers", "float_output") else wrong
    target = targets.load(str(saved(tmp_path, HEAD + f'[ops]\n{name} = ["{wrong}"]\n')))
    with pytest.raises(ConfigError, match=rf"target mine: ops.{name} lists {wrong}: choose among \w"):
        check_roles(target)


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
        "field weight.scale='round' is wrong: input should be 'any' or 'power of two'",
    ),
    "unsigned weights": ('[weight]\ncontainer = "uint8"', "weights are int8, because their zero point is 0"),
    "unsigned and symmetric": ("[activation]\nsymmetric = true", "symmetric activations are int8"),
    "no type": (
        '[activation]\ncontainer = "int4"',
        "field activation.container='int4' is wrong: input should be 'int8' or 'uint8'",
    ),
    "a range without negative integers": (
        "[weight]\nrange_8_bits = [0, 127]",
        "a range goes from -128 or more",
    ),
    "a range beyond int8": (
        "[weight]\ndepthwise_range_8_bits = [-127, 128]",
        "a range goes from -128 or more",
    ),
    "an old opset": ("min_opset = 12", "field min_opset=12 is wrong"),
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
        tmp_path / "base", HEAD + 'activation.scale = "power of two"\nops.absorbed = ["Relu"]\n', "first.toml"
    )
    text = 'name = "second"\ntitle = "Second"\nextends = "base/first.toml"\nbias.integer = false\n[kernels]\n'
    second = targets.load(saved(tmp_path, text))
    assert (second.name, second.title) == ("second", "Second")
    assert second.activation == base.activation.model_copy(update={"scale": ScaleRule.POWER_OF_TWO})
    assert second.ops == base.ops.model_copy(update={"absorbed": frozenset({"Relu"})})
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
    assert "scale" not in plain.model_dump()["weight"]
    powers = targets.load(saved(tmp_path, HEAD + 'weight.scale = "power of two"\n'))
    same = targets.load(saved(tmp_path, HEAD + 'weight.scale = "any"\n'))
    hashes = [
        Config().digest(t.model_copy(update={"name": "a", "title": "a"})) for t in (plain, same, powers)
    ]
    assert hashes[0] == hashes[1] != hashes[2]


def test_all_fields_are_described():
    page = (MODELS.parent / "docs" / "targets.md").read_text(encoding="utf-8")
    described = set(re.findall(r"`([\w.]+)`", " ".join(re.findall(r"^\| (`.*?`) \|", page, re.MULTILINE))))
    fields = {"extends"}
    for name, field in Target.model_fields.items():
        whole = (
            field.annotation
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
            else None
        )
        fields |= (
            {name}
            if whole is None or whole is OpRules
            else {f"{name}.{inner}" for inner in whole.model_fields}
        )
    assert fields == described - {"mine.toml"}
    for role in OpRules.model_fields:
        assert f"- `{role}`: " in page


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
    assert pages.on_page_markdown("# Other") == "# Other"
    assert name in help_of("target", Config.model_fields["target"])
