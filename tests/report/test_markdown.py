"""The report as Markdown."""

from __future__ import annotations

import re

from reports import POOR, layer, noise, report

from eptq_onnx.report.markdown import text

HOSTILE = "a|b`c`</td><script>alert(1)</script> **x** [y](z) \\ \n# no heading"


def rows(markdown: str) -> list[list[str]]:
    """Cells of all lines of tables."""
    lines = [line for line in markdown.splitlines() if line.startswith("| ")]
    return [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines]


def test_verdict_figures_and_all_layers():
    found = report(
        statistics={"y": POOR}, noise=noise(), layers=(layer("first", 4), layer("second", 4))
    ).to_markdown()
    assert found.startswith("# net.onnx → ort-x64-vnni\n")
    assert (
        found.index("**expect loss**: y keeps 12.0 dB")
        < found.index("## What to try")
        < found.index("## Layers")
    )
    cells = [[c.strip() for c in row] for row in rows(found)]
    assert ["1", "first", "Conv", "W4A8", r"\[-7, 7\]", "25.00", "20.00", "15.00", "0.5"] in cells
    assert ["size", "4 kB → 1.2 kB (3.33× smaller)"] in cells
    assert any(row[0] == "--weight-bits 8" for row in cells)
    assert ["**Conv**", "**2**", "**1**"] in cells, "fewer kernels than planned"
    assert "- a note" in found


def test_the_command_is_that_of_the_run():
    config = {
        "weight_bits": 4,
        "bits": ["op:Gemm=w8a8"],
        "samples": 100,
        "measure_speed": False,
        "image": {"size": [224, 224]},
    }
    found = report(config=config, model="my net.onnx").to_markdown()
    assert (
        "eptq-onnx quantize 'my net.onnx' --data photos --image size=224 --samples 100 --weight-bits 4 --bits op:Gemm=w8a8 "
        "--objective integers --no-measure-speed\n```" in found
    )


def test_hostile_names_change_no_structure():
    plain, hostile = (
        report(model=name, layers=(layer(name),), notes=(name,)).to_markdown() for name in ("net", HOSTILE)
    )
    assert [len(row) for row in rows(plain)] == [len(row) for row in rows(hostile)]
    outside = re.sub(r"(?ms)^````*\n.*?^````*\n", "", hostile)
    assert "<" not in outside
    assert not re.search(r"(?<!\\)`", outside)
    assert plain.count("\n") == hostile.count("\n")
    assert plain.count("\n#") == hostile.count("\n#")


def test_a_command_with_fences_stays_in_its_own():
    found = report(model="````").to_markdown()
    assert re.search(r"^`{5}\neptq-onnx quantize '````' .*\n`{5}$", found, re.MULTILINE)


def test_text_is_escaped():
    assert text("a_b*c\nd<e>&") == r"a\_b\*c\\nd&lt;e&gt;&amp;"
