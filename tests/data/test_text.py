"""Text with a tokenizer: what is filled, cut and said."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from graphs import parse
from tokenizers import BertWordPieceTokenizer, Tokenizer, models, pre_tokenizers, processors

from eptq_onnx import Data, DataError, InstallError, data

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "c", "d"]
TEXTS = ["a b", "c", "a b c d", "d d"]


def model(
    length: object = "T", inputs: str = "input_ids attention_mask token_type_ids", kind: str = "int64"
) -> Any:
    first, *_ = names = inputs.split()
    listed = ", ".join(f"{kind}[N,{length}] {name}" for name in names)
    return parse(f"g ({listed}) => ({kind}[N,{length}] y) {{ y = Identity ({first}) }}")


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    made = Tokenizer(models.WordLevel({w: k for k, w in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    made.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def loaded(source: Path, of: Any, tokenizer: Path | None, **options: Any) -> data.Candidates:
    return data.load(Data(source, tokenizer=tokenizer, **options), of)


def written(folder: Path, lines: list[str], name: str = "texts.txt") -> Path:
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / name


def test_a_line_is_a_sample_and_all_inputs_are_filled(tmp_path, tokenizer):
    found = loaded(written(tmp_path, [*TEXTS, "", "  "]), model(), tokenizer)
    feeds = found.samples[0].take(range(4))
    np.testing.assert_array_equal(feeds["input_ids"][1], [2, 6, 3, 0, 0, 0])
    np.testing.assert_array_equal(feeds["attention_mask"][1], [1, 1, 1, 0, 0, 0])
    assert feeds["token_type_ids"].shape == (4, 6)
    assert found.origin.notes == ()
    assert str(found.origin).endswith("guessed: 6 tokens (the longest text)")


@pytest.mark.parametrize("kind", ["int32", "int64"])
@pytest.mark.parametrize(
    ("inputs", "length"),
    [("input_ids", 5), ("ids", "T"), ("input_ids position_ids", 9), ("input_ids input_mask segment_ids", 3)],
)
def test_names_lengths_and_types_are_those_of_the_model(tmp_path, tokenizer, kind, inputs, length):
    feeds = loaded(written(tmp_path, TEXTS), model(length, inputs, kind), tokenizer).samples[0].take(range(4))
    assert list(feeds) == inputs.split()
    for value in feeds.values():
        assert value.shape == (4, 6 if length == "T" else length)
        assert value.dtype == kind
    if "position_ids" in feeds:
        np.testing.assert_array_equal(feeds["position_ids"][2], range(9))


def test_longer_text_is_cut_and_told(tmp_path, tokenizer):
    found = loaded(written(tmp_path, [*TEXTS, "a " * 5000]), model(4), tokenizer)
    assert found.origin.notes == ("2 of 5 texts have more than 4 tokens (the model's input) and are cut",)
    np.testing.assert_array_equal(found.samples[0].take([2])["input_ids"], [[2, 4, 5, 3]])
    free = loaded(written(tmp_path, [*TEXTS, "a " * 5000]), model(), tokenizer)
    assert free.samples[0].take([0])["input_ids"].shape == (1, 512)
    assert "are cut" in free.origin.notes[0]


def test_the_tokenizers_own_limit_and_filling_are_taken(tmp_path, tokenizer):
    made = Tokenizer.from_file(str(tokenizer))
    made.enable_truncation(5)
    made.enable_padding(pad_id=7, pad_token="d", direction="left")
    made.save(str(tokenizer))
    found = loaded(written(tmp_path, TEXTS), model(), tokenizer)
    assert found.origin.notes == ("1 of 4 texts have more than 5 tokens (the tokenizer's limit) and are cut",)
    np.testing.assert_array_equal(found.samples[0].take([1])["input_ids"], [[7, 7, 2, 6, 3]])


@pytest.mark.parametrize(
    "lines",
    [
        ['"a b"', '"c"'],
        ['{"text": "a b", "label": 3}', '{"id": 1, "text": "c"}'],
        ['["a b"]', '["c", 4]'],
    ],
)
def test_lines_of_json_hold_one_text(tmp_path, tokenizer, lines):
    samples = loaded(written(tmp_path, lines, "x.jsonl"), model(), tokenizer).samples[0]
    np.testing.assert_array_equal(samples.take([0, 1])["input_ids"], [[2, 4, 5, 3], [2, 6, 3, 0]])


def test_pairs_are_one_sample(tmp_path, tokenizer):
    file = written(
        tmp_path, [json.dumps({"sentence1": "a", "sentence2": "b c", "score": 0.5})] * 2, "x.jsonl"
    )
    feeds = loaded(file, model(), tokenizer).samples[0].take([0])
    np.testing.assert_array_equal(feeds["input_ids"], [[2, 4, 3, 5, 6, 3]])
    np.testing.assert_array_equal(feeds["token_type_ids"], [[0, 0, 0, 1, 1, 1]])


def test_a_text_is_named_by_its_number_and_how_it_begins(tmp_path, tokenizer):
    long = "a b " * 40
    file = written(tmp_path, ["a  b", "", long, "c", "d"])
    assert loaded(file, model(), tokenizer).names == ("1: a b", f"2: {long[:59]}…", "3: c", "4: d")
    assert loaded(file, model(), tokenizer, samples=2).names == ("1: a b", "4: d")
    pair = written(tmp_path, [json.dumps(["a", "b c"])], "pair.jsonl")
    assert loaded(pair, model(), tokenizer).names == ("1: a | b c",)


def test_samples_are_spread_over_the_lines(tmp_path, tokenizer):
    file = written(tmp_path, ["a"] * 50 + ["b"] * 50)
    samples = loaded(file, model(), tokenizer, samples=10).samples[0]
    assert samples.take(range(10))["input_ids"][:, 1].tolist() == [4] * 5 + [5] * 5


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", b"", "holds no text"),
        ("x.txt", b"\n \n", "holds no text"),
        ("x.txt", b"\xff\xfe\xfa", "is not text in UTF-8"),
        ("x.txt", bytes(range(128, 256)), "is not text in UTF-8"),
        ("x.jsonl", b'"a"\n{"text": ', "line 2 is not JSON"),
        ("x.jsonl", b"[" * 100000, "line 1 is not JSON"),
        ("x.jsonl", b'{"label": 3}', "line 1 holds no text"),
        ("x.jsonl", b"null", "line 1 holds no text"),
        ("x.jsonl", b'["a", "b", "c"]', "more than two texts"),
    ],
)
def test_files_that_are_no_text_are_told(tmp_path, tokenizer, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as e:
        loaded(tmp_path / name, model(), tokenizer)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("cased", [False, True])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_a_vocabulary_like_berts_is_a_tokenizer(tmp_path, cased, ending):
    """As transformers' BertTokenizer, by the library's own implementation."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "un", "##able", "able", "é", "e", "!", "[", "]"]
    pieces += ["Un", "Able"] * cased
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_bytes(ending.join([*pieces, ""]).encode())
    texts = ["Unable able!", "é Able", "able [MASK] nothing", "[un]"]
    found = loaded(written(tmp_path, texts), model(), vocabulary)
    wanted = BertWordPieceTokenizer({p: k for k, p in enumerate(pieces)}, lowercase=not cased)
    wanted.enable_padding(length=found.samples[0].take([0])["input_ids"].shape[1])
    for k, text in enumerate(texts):
        assert found.samples[0].take([k])["input_ids"][0].tolist() == wanted.encode(text).ids
    guess = "case counts (some pieces have capitals)" if cased else "lower case (no piece has capitals)"
    assert guess in str(found.origin)
    pair = written(tmp_path, [json.dumps(["un", "able able"])], "pair.jsonl")
    feeds = loaded(pair, model(), vocabulary).samples[0].take([0])
    assert feeds["token_type_ids"].tolist() == [[0, 0, 0, 1, 1, 1]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"lacks \[UNK\], \[CLS\], \[SEP\]"),
        (b"some words\nof a text\n", r"is not a vocabulary like BERT's"),
        (b"[PAD]\n[UNK]\n[CLS]\n", r"lacks \[SEP\]\. Give a tokenizer\.json"),
        (b"\xff\xfe\x00", "cannot be read as text in UTF-8"),
    ],
)
def test_what_is_no_vocabulary_is_told(tmp_path, content, message):
    (tmp_path / "vocab.txt").write_bytes(content)
    with pytest.raises(DataError, match=message) as e:
        loaded(written(tmp_path, TEXTS), model(), tmp_path / "vocab.txt")
    assert "\n" not in str(e.value)


def test_what_is_missing_is_told(tmp_path, tokenizer, monkeypatch):
    file = written(tmp_path, TEXTS)
    with pytest.raises(DataError, match=r"missing\.txt cannot be read: No such file"):
        loaded(tmp_path / "missing.txt", model(), tokenizer)
    with pytest.raises(DataError, match=r"give the model's tokenizer\.json, or the vocab\.txt"):
        loaded(file, model(), None)
    with pytest.raises(DataError, match=r"tokenizer .*none\.json does not exist"):
        loaded(file, model(), tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(DataError, match=r"bad\.json is not a readable tokenizer\.json"):
        loaded(file, model(), tmp_path / "bad.json")
    with pytest.raises(DataError, match="a tokenizer does not fill the input 'cache' int64"):
        loaded(file, model(inputs="input_ids cache"), tokenizer)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(InstallError, match=r"eptq-onnx\[text\]"):
        loaded(file, model(), tokenizer)
