"""Reader of text, with the tokenizer of the model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eptq_onnx.data.inputs import Input
from eptq_onnx.data.origin import Origin
from eptq_onnx.data.readers.base import Opened, Reader, Request, Wanted, is_path
from eptq_onnx.data.shelf import Shelf
from eptq_onnx.errors import DataError, InstallError, one_line

_MOST = 512
"""Tokens of the longest sample, if neither the model nor the tokenizer limits them."""
_FILLED = {
    "input_ids": "ids",
    "attention_mask": "attention_mask",
    "token_type_ids": "type_ids",
    "position_ids": "positions",
    "input_mask": "attention_mask",
    "segment_ids": "type_ids",
}
"""Inputs that are filled, and what of the tokenizer's result each takes."""
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
"""Pieces of a vocabulary like BERT's that are never split."""
_SHOWN = 60
"""Characters of a text that its name holds."""
_BATCH = 256
"""Texts that are tokenized at once."""
Text = str | tuple[str, str]
"""A text, or a pair that the model takes as one."""


class TextReader(Reader):
    """Reads texts and tokenizes them."""

    form = (
        "a .txt file with one text a line, or a .jsonl file with one string, or object with one or two "
        "strings, a line, tokenized by --tokenizer"
    )
    order = 42

    def takes(self, source: Any) -> bool:
        """Return True for names that end in .txt or .jsonl."""
        return (
            is_path(source)
            and Path(source).suffix.lower() in (".txt", ".jsonl")
            and not Path(source).is_dir()
        )

    def open(self, source: Any, request: Request) -> Opened:
        """Return the chosen texts as tokens, all of one length."""
        path, file = Path(source), request.reading.tokenizer
        kinds = _kinds(request.inputs)
        if file is None:
            raise DataError(
                f"data file {path} holds text: give the model's tokenizer.json, or the vocab.txt of one like "
                "BERT, with --tokenizer."
            )
        tokenizer, guessed = _tokenizer(file)
        count = sum(1 for _ in _texts(path))
        if not count:
            raise DataError(f"data file {path} holds no text.")
        places = set(request.chosen(count))
        numbered = [(k, text) for k, text in enumerate(_texts(path), 1) if k - 1 in places]
        chosen = [text for _, text in numbered]
        padding = tokenizer.padding or {}
        length, cut = _length(tokenizer, chosen, request.inputs)
        _fit(tokenizer, padding, length.tokens)
        shelves = {name: Shelf() for name in kinds}
        dtypes = {i.name: i.dtype for i in request.inputs}
        for start in range(0, len(chosen), _BATCH):
            for encoding in tokenizer.encode_batch(chosen[start : start + _BATCH]):
                for name, kind in kinds.items():
                    row: NDArray[Any] = (
                        np.arange(length.tokens) if kind == "positions" else np.array(getattr(encoding, kind))
                    )
                    shelves[name].add(row.astype(dtypes[name] or np.int64))
        notes = [f"{cut} of {len(chosen)} texts have more than {length} and are cut"] if cut else []
        recipe = {"tokenizer": str(file)}
        origin = Origin(str(path), recipe, (*guessed, f"{length}"), tuple(notes))
        names = tuple(_name(number, text) for number, text in numbered)
        return Opened({name: shelf.values() for name, shelf in shelves.items()}, origin, names=names)

    def wanted(self, request: Request) -> Wanted | None:
        """Return text if a tokenizer fills all inputs, all of them with two axes."""
        try:
            _kinds(request.inputs)
        except DataError:
            return None
        if any(i.dims is None or len(i.dims) != 2 for i in request.inputs):
            return None
        file = request.reading.tokenizer or "tokenizer.json"
        return Wanted("texts", ("--data", "texts.txt", "--tokenizer", str(file)))


@dataclass(frozen=True)
class _Length:
    """Tokens of every sample, and what says so."""

    tokens: int
    why: str

    def __str__(self) -> str:
        return f"{self.tokens} tokens ({self.why})"


def _name(number: int, text: Text) -> str:
    """Return the number of a text, counted from 1 without empty lines, and how it begins."""
    words = " ".join((text if isinstance(text, str) else " | ".join(text)).split())
    return f"{number}: {words if len(words) <= _SHOWN else words[: _SHOWN - 1] + '…'}"


def _kinds(inputs: tuple[Input, ...]) -> dict[str, str]:
    """Return what of the tokenizer's result each input takes.

    Raises
    ------
    DataError
        If there is an input that a tokenizer does not fill.
    """
    if len(inputs) == 1 and inputs[0].dtype is not None and inputs[0].dtype.kind in "iu":
        return {inputs[0].name: "ids"}
    other = [
        i for i in inputs if i.name not in _FILLED or i.dtype is None or i.dims is None or len(i.dims) != 2
    ]
    if other:
        raise DataError(
            f"a tokenizer does not fill the input {other[0]}: text is read for models with inputs of two "
            f"axes named {', '.join(_FILLED)}; give arrays, as a .npz file or module:function."
        )
    return {i.name: _FILLED[i.name] for i in inputs}


def _tokenizer(file: Path) -> tuple[Any, tuple[str, ...]]:
    """Return the tokenizer of a file, and what the file does not say."""
    if not file.is_file():
        raise DataError(f"tokenizer {file} does not exist.")
    try:
        library = import_module("tokenizers")
    except ImportError as e:
        raise InstallError("text needs the library tokenizers: pip install 'eptq-onnx[text]'.") from e
    if file.suffix.lower() == ".txt":
        return _word_pieces(file)
    try:
        return library.Tokenizer.from_file(str(file)), ()
    except Exception as e:  # the library has no errors of its own
        raise DataError(f"tokenizer {file} is not a readable tokenizer.json: {one_line(e, 150)}.") from e


def _word_pieces(file: Path) -> tuple[Any, tuple[str, ...]]:
    """Return the tokenizer of a vocabulary like BERT's: one piece a line. Whether case counts is guessed.

    Raises
    ------
    DataError
        If it is no such vocabulary.
    """
    try:
        pieces = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(f"tokenizer {file} cannot be read as text in UTF-8: {one_line(e, 150)}.") from e
    numbers = {piece.rstrip("\r"): k for k, piece in enumerate(pieces) if piece.rstrip("\r")}
    missing = [token for token in ("[UNK]", "[CLS]", "[SEP]") if token not in numbers]
    if missing:
        raise DataError(
            f"tokenizer {file} is not a vocabulary like BERT's, one piece a line: it lacks "
            f"{', '.join(missing)}. Give a tokenizer.json."
        )
    library, part = import_module("tokenizers"), import_module
    cased = any(piece != piece.lower() for piece in numbers if not piece.startswith("["))
    tokenizer = library.Tokenizer(part("tokenizers.models").WordPiece(numbers, unk_token="[UNK]"))
    tokenizer.add_special_tokens([token for token in _SPECIAL if token in numbers])
    tokenizer.normalizer = part("tokenizers.normalizers").BertNormalizer(lowercase=not cased)
    tokenizer.pre_tokenizer = part("tokenizers.pre_tokenizers").BertPreTokenizer()
    ends = (("[SEP]", numbers["[SEP]"]), ("[CLS]", numbers["[CLS]"]))
    tokenizer.post_processor = part("tokenizers.processors").BertProcessing(*ends)
    why = "some pieces have" if cased else "no piece has"
    return tokenizer, (f"{'case counts' if cased else 'lower case'} ({why} capitals)",)


def _length(tokenizer: Any, texts: list[Text], inputs: tuple[Input, ...]) -> tuple[_Length, int]:
    """Return the length that all samples get, and the number of texts that are longer."""
    limit = (tokenizer.truncation or {}).get("max_length")
    stated = {d for i in inputs for d in (i.dims or ())[1:2] if isinstance(d, int)}
    tokenizer.no_truncation()
    tokenizer.no_padding()
    lengths = [
        len(encoding.ids)
        for start in range(0, len(texts), _BATCH)
        for encoding in tokenizer.encode_batch(texts[start : start + _BATCH])
    ]
    longest = max(lengths)
    if stated:
        length = _Length(min(stated), "the model's input")
    elif longest <= (limit or _MOST):
        length = _Length(max(longest, 1), "the longest text")
    else:
        length = _Length(
            limit or _MOST, "the tokenizer's limit" if limit else "the most where nothing limits them"
        )
    return length, sum(n > length.tokens for n in lengths)


def _fit(tokenizer: Any, own: Mapping[str, Any], length: int) -> None:
    """Make the tokenizer cut and fill up to a length, with its own filling where it has one."""
    names = [
        name for name in ("[PAD]", "<pad>", "<|padding|>", "</s>") if tokenizer.token_to_id(name) is not None
    ]
    token = own.get("pad_token", names[0] if names else "[PAD]")
    number = own.get("pad_id", tokenizer.token_to_id(names[0]) if names else 0)
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(
        length=length,
        pad_id=number,
        pad_token=token,
        pad_type_id=own.get("pad_type_id", 0),
        direction=own.get("direction", "right"),
    )


def _texts(path: Path) -> Iterator[Text]:
    """Yield the texts of a file; empty lines are left out.

    Raises
    ------
    DataError
        If it cannot be read.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield (
                        _text(line, f"data file {path}, line {number}")
                        if path.suffix.lower() == ".jsonl"
                        else line.strip()
                    )
    except OSError as e:
        raise DataError(f"data file {path} cannot be read: {e.strerror or e}.") from e
    except UnicodeDecodeError as e:
        raise DataError(f"data file {path} is not text in UTF-8.") from e


def _text(line: str, label: str) -> Text:
    """Return the text of a line of JSON, or the pair of its first two."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise DataError(f"{label} is not JSON: {one_line(e, 100)}.") from e
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
    found = list(islice((v for v in values if isinstance(v, str)), 3))
    if not found or len(found) > 2:
        raise DataError(
            f"{label} holds {'no text' if not found else 'more than two texts'}: give one text or a pair."
        )
    return found[0] if len(found) == 1 else (found[0], found[1])
