"""Tables at any width: nothing that is to be copied is cut or broken, and no table is wider than the console."""

from __future__ import annotations

import io
import re

from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from eptq_onnx.report.sheet import Labelled, Sheet, for_console

BORDERS = "┃│┡┏└━─"
WORDS = st.lists(st.text("abcdefgh", min_size=1, max_size=9), min_size=1, max_size=25).map(" ".join)
NAMES = st.text("abc/._", min_size=1, max_size=90) | st.lists(
    st.text("abc=._'", min_size=1, max_size=60), min_size=1, max_size=3
).map(lambda values: " ".join(f"--exclude {value}" for value in values))
WIDTHS = st.sampled_from([60, 80, 120])


def lines(item, width: int) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=width).print(item, crop=False)
    return [text.rstrip() for text in out.getvalue().splitlines()]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(WORDS, NAMES, WORDS, NAMES), min_size=1, max_size=4), WIDTHS)
def test_names_and_options_stand_in_one_line_and_words_are_whole(rows, width):
    sheet = Sheet("Title", ("words", "option", "why", "name"), tuple(rows), names=(1, 3))
    shown = lines(for_console(sheet), width)
    for first, option, why, name in rows:
        cells = [re.split("[│┃]", text) if text[:1] in BORDERS else [text] for text in shown]
        held = [cell.strip() for row in cells for cell in row]
        assert any(option in cell for cell in held)
        words = " ".join(held).replace(";", " ").split()
        for word in [*first.split(), *why.split(), *name.split()]:
            assert word in words
    assert all(len(text) <= width for text in shown if text[:1] and text[:1] in BORDERS)
    assert not any("…" in text for text in shown)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=6), WIDTHS)
def test_a_table_that_fits_is_a_table_with_all_words(rows, width):
    shown = lines(for_console(Sheet("Title", ("first", "second"), tuple(rows))), width)
    assert shown[1].startswith("┏")
    assert all(len(text) <= width for text in shown)
    for cell in (cell for row in rows for cell in row):
        assert set(cell.split()) <= set(" ".join(shown).split())


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.text("ab", min_size=1, max_size=9), WORDS, NAMES), min_size=1, max_size=4), WIDTHS
)
def test_labelled_lines_break_between_words_alone(rows, width):
    """A recipe is one long word, and is to be copied."""
    shown = lines(Labelled(tuple((label, f"{text} {name}", "") for label, text, name in rows)), width)
    for _, text, name in rows:
        for word in [*text.split(), *name.split()]:
            assert any(word in line.split() for line in shown)
    assert all(len(text) <= width or len(text.split()) <= 2 for text in shown)


def test_what_is_left_out_is_counted_in_both_forms():
    for name in ("short", "x" * 100):
        rows = tuple((f"{name}{k}", "why") for k in range(5))
        sheet = Sheet("Title", ("name", "why"), rows, names=(0,), most=3)
        words = " ".join(" ".join(lines(for_console(sheet, everything=False), 80)).split())
        assert words.endswith("and 2 more, which --verbose and --report show")
        assert "more" not in " ".join(lines(for_console(sheet), 80))
