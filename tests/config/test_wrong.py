"""Wrong values of every option, drawn: one clear sentence that names the option and says what to give."""

from __future__ import annotations

import re

import numpy as np
import onnx
import pytest
from graphs import small_convnet
from hypothesis import example, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from eptq_onnx import Accuracy, Config, ConfigError, Gate
from eptq_onnx.cli import app
from eptq_onnx.config import Reading
from eptq_onnx.config.option import flags_of
from eptq_onnx.config.recipes import AudioRecipe, ImageRecipe

MODELS = (Config, Reading, Gate, Accuracy)
FIELDS = [(model, name) for model in MODELS for name in model.model_fields]
LEAKS = re.compile(
    r"[Vv]alue error|[Ii]nput should|[Ii]nput is|pydantic|valid (tuple|string|dict|integer|number|boolean)|"
    r"unable to|<class|constrained|function-|type=|callable\b|e\+0"
)
"""What belongs to a library, and not to a sentence for users."""
WRONG = st.one_of(
    st.integers(-5, 100_000), st.floats(), st.text(max_size=12), st.none(), st.booleans(),
    st.lists(st.integers(), max_size=2), st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    st.just(object()), st.binary(max_size=4), st.sampled_from(["w9a8", "weights=", "time=x", "a=b", "module", "1e9999"]),
)  # fmt: skip


def message(model, **options) -> str:
    """The message of an error, empty if the options are right; any other exception is a fault."""
    try:
        model(**options)
    except ConfigError as e:
        return str(e)
    return ""


@settings(max_examples=500, deadline=None)
@given(st.sampled_from(FIELDS), WRONG)
@example((Config, "bits"), "\r")
@example((Config, "weight_bits"), "\n9")
@example((Config, "preset"), "fast\u2028er")
def test_a_wrong_value_is_one_sentence_that_names_the_option(field, value):
    model, name = field
    text = message(model, **{name: value})
    if text:
        assert name in text
        assert len(text.splitlines()) == 1
        assert text.endswith((".", "?"))
        assert not LEAKS.search(re.sub(r"=.* is wrong", "", text, flags=re.DOTALL)), text
        assert len(text) < 700


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        (Config, {"weight_bits": 9}, "option weight_bits=9 is wrong: give a whole number from 2 to 8."),
        (Config, {"weight_bits": "nine"}, "option weight_bits='nine' is wrong: give a whole number from 2 to 8."),
        (Config, {"activation_bits": 9}, "give a whole number from 2 to 8, or 16, or 32."),
        (Config, {"preset": "fst"}, "give fast, balanced or paper (did you mean fast?)."),
        (Config, {"percentile": 10}, "give a number above 50 and at most 100."),
        (Config, {"seed": -1}, "give a whole number of at least 0."),
        (Config, {"max_memory": "4 apples"}, "give a size such as 4GB or 500MB."),
        (Config, {"damping": float("inf")}, "give a finite number."),
        (Config, {"wieght_bits": 4}, "option wieght_bits is unknown: did you mean weight_bits?"),
        (Reading, {"samples": 0}, "option samples=0 is wrong: give a whole number of at least 1."),
        (Reading, {"image": "szie=3"}, "option image.szie is unknown: did you mean size? image takes size, resize,"),
        (Reading, {"image": {"colour": "rgb"}}, "did you mean color? image takes"),
        (Reading, {"image": "size=big"}, "give a side such as 224, or height and width such as 320x224."),
        (Reading, {"image": "fit=letterbx"}, "letterbox-corner (did you mean letterbox?)."),
        (Reading, {"audio": "rte=16000"}, "option audio.rte is unknown: did you mean rate? audio takes rate,"),
        (Reading, {"audio": "zzz=1"}, "option audio.zzz is unknown: audio takes rate, seconds, channels."),
        (Gate, {"evaluate": "metric"}, "write it as module:function, such as metric:accuracy for accuracy in"),
    ],
)  # fmt: skip
def test_it_says_the_limits_and_what_may_be_meant(model, options, words):
    assert words in message(model, **options)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([(m, n) for m in (ImageRecipe, AudioRecipe) for n in m.model_fields]), st.data())
def test_a_key_of_a_recipe_with_a_slip_is_suggested(key, data):
    recipe, name = key
    place = data.draw(st.integers(0, len(name) - 2))
    slip = name[:place] + name[place + 1] + name[place] + name[place + 2 :]
    if slip in recipe.model_fields:
        return
    option = "image" if recipe is ImageRecipe else "audio"
    text = message(Reading, **{option: f"{slip}=1"})
    assert text.startswith(f"option {option}.{slip} is unknown: did you mean {name}?")
    assert all(known in text for known in recipe.model_fields)


COMMANDS = {Config: "quantize", Reading: "quantize", Accuracy: "quantize", Gate: "verify"}
NUMBERS_AND_WORDS = [
    (model, name) for model, name in FIELDS if message(model, **{name: "?!"}) and len(flags_of(name, model.model_fields[name])) == 1
]  # fmt: skip


@pytest.mark.parametrize(("model", "name"), NUMBERS_AND_WORDS)
def test_on_the_command_line_too(model, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    onnx.save(small_convnet(), "f.onnx")
    np.savez("data.npz", image=np.zeros((2, 3, 8, 8), np.float32))
    files = ["f.onnx"] if COMMANDS[model] == "quantize" else ["f.onnx", "f.onnx"]
    flag = flags_of(name, model.model_fields[name])[0]
    result = CliRunner().invoke(app, [COMMANDS[model], *files, "--data", "data.npz", flag, "?!"])
    assert result.exit_code == 2
    [text] = result.stderr.strip().splitlines()
    assert text.startswith("error: ")
    assert name in text
    assert not LEAKS.search(text)
    assert not list(tmp_path.glob("*.w*.onnx"))


def test_the_command_line_is_covered():
    assert len(NUMBERS_AND_WORDS) > 30
