"""The report as a page: whole, harmless, and without anything that it would fetch."""

from __future__ import annotations

import base64
import hashlib
import io
import itertools
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from reports import FRONT, POOR, exhibits, layer, noise, report

from eptq_onnx.data.origin import Origin
from eptq_onnx.diagnosis import Exhibits, NodePlace, Picture, SampleNoise
from eptq_onnx.outcome import OperatorTime
from eptq_onnx.placement import FrontPoint
from eptq_onnx.report.front import front_sheet
from eptq_onnx.report.page import plots
from eptq_onnx.report.page.page import page_of
from eptq_onnx.report.page.pictures import data_uri
from eptq_onnx.report.page.strip import strip

HOSTILE = '</script></title><b onclick="x">\'$\\frac{1}{2}$&amp;\u202e\n\ud800{{ 7*7 }}'
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """What a browser finds in a page: elements, attributes, text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert not self.open, "an element is not closed"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def ids(self) -> list[str]:
        return [attributes["id"] for _, attributes in self.tags if "id" in attributes]

    @property
    def text(self) -> str:
        return "".join(text for tag, text in self.texts if tag not in ("style", "script"))


@pytest.fixture(scope="module")
def full() -> str:
    return page_of(report(statistics={"y": POOR}, noise=noise(), layers=(layer("conv0", 4), layer("conv1"))))


@pytest.fixture(scope="module")
def bare() -> str:
    return page_of(
        report(
            layers=(layer(attention=None, own_db=None, nearest_db=None),), optimization=None, front=(), notes=(),
            speed=None, kept_float=(), exhibits=Exhibits(), statistics={},
            verification={"worst": (), "planned": {}},
        )
    )  # fmt: skip


def test_it_holds_everything(full):
    page = Page(full)
    contents = [a["href"].removeprefix("#") for a in page.all("a")]
    assert contents == [
        "advice", "run", "accuracy", "size", "speed", "layers", "network", "ranges", "attention", "optimization",
        "front", "samples", "time", "notes",
    ]  # fmt: skip
    assert set(contents) <= set(page.ids())
    for text in (
        "expect loss", "y keeps 12.0 dB", "--weight-bits", "about", "eptq-onnx quantize net.onnx --data photos",
        "Float against quantized, 32 held-out samples", "KL 0.2", "3.33× smaller", "1.20× slower",
        "no integer kernel", "a.jpg: y 4.0 dB", "--image 'size=224'", "a note", "Softmax",
    ):  # fmt: skip
        assert text in page.text, text
    assert full.index("expect loss</strong>") < full.index("What to try</h2>") < full.index("The run</h2>")


def test_what_is_not_there_is_left_out(bare):
    page = Page(bare)
    contents = {a["href"].removeprefix("#") for a in page.all("a")}
    assert contents == {"run", "accuracy", "size", "speed", "layers", "network", "time"}
    assert contents <= set(page.ids())
    assert "No node stays in floating point." in page.text
    assert "not measured" in page.text
    assert "None" not in page.text
    assert "nan" not in re.findall(r"\w+", page.text)


def test_it_fetches_nothing(full):
    page = Page(full)
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            assert attributes.get(name, "#").startswith(("#", "data:image/png;base64,")), (tag, attributes)
    assert "http" not in re.sub(r"http-equiv", "", full)
    assert "@import" not in full
    assert all(target.startswith("#") for target in re.findall(r"url\(['\"]?([^)]*)", full))
    [policy] = [m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in policy
    [script] = [text for tag, text in page.texts if tag == "script"]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy, "no other script runs"


def test_what_refers_to_something_finds_it(full):
    page = Page(full)
    ids = page.ids()
    assert len(ids) == len(set(ids))
    for _, attributes in page.tags:
        named = attributes.get("aria-labelledby", "").split() + re.findall(
            r"url\(#([^)]+)\)", " ".join(attributes.values())
        )
        named += [attributes["href"][1:]] if attributes.get("href", "").startswith("#") else []
        assert set(named) <= set(ids)


def test_it_is_accessible(full):
    page = Page(full)
    assert page.all("html")[0]["lang"] == "en"
    assert all(image["alt"] for image in page.all("img"))
    assert all(th.get("scope") for th in page.all("th"))
    pictures = [a for a in page.all("svg")]
    assert len(pictures) == 9, "layers, operators, strip, two histograms, attention, losses, front, seconds"
    assert all(a.get("role") == "img" and a.get("aria-labelledby") for a in pictures)
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_contrast_with_what_is_behind_them(full, scheme):
    """WCAG asks for 4.5."""
    style = full[full.index("<style>") : full.index("</style>")]
    blocks = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    colours = dict(re.findall(r"--([\w-]+): (#\w{6})", blocks[0] if scheme == "light" else blocks[1]))

    def luminance(colour: str) -> float:
        parts = np.array([int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)])
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    def contrast(a: str, b: str) -> float:
        low, high = sorted(luminance(colours[name]) for name in (a, b))
        return (high + 0.05) / (low + 0.05)

    for name in ("ink", "soft", "first", "second", "third", "loss"):
        assert contrast(name, "paper") >= 4.5, name
    for name in ("safe", "check", "loss"):
        assert contrast(name, f"{name}-paper") >= 4.5, name
        assert contrast("ink", f"{name}-paper") >= 4.5, name


def test_plots_take_the_colours_of_the_page(full):
    assert not re.search(r"#(0\d)\1\1\b", full[full.index("<svg") :].replace("#000000", ""))
    assert "var(--first)" in full[full.index("<svg") :]


def test_hostile_names_are_harmless(full):
    names = (HOSTILE, f"{HOSTILE}2", f"{HOSTILE}3")
    hostile = page_of(
        report(
            model=HOSTILE, target=HOSTILE, statistics={HOSTILE: POOR}, noise=noise(), notes=(HOSTILE,),
            data=Origin(HOSTILE, {"image": HOSTILE}), layers=tuple(layer(n) for n in names[:2]),
            exhibits=replace(
                exhibits(names),
                pictures=(Picture(HOSTILE, SampleNoise(7, HOSTILE, 4.0), np.zeros((8, 8, 3), np.uint8)),),
            ),
            config={"bits": [f"{HOSTILE}=w4a8"]},
        )
    )  # fmt: skip
    before, after = Page(full), Page(hostile)
    kinds = [
        sorted(tag for tag, _ in page.tags if tag not in ("use", "path", "g", "text"))
        for page in (before, after)
    ]
    assert [k for k in set(kinds[1]) if k in ("b", "iframe", "object")] == []
    assert kinds[1].count("script") == kinds[0].count("script") == 1
    assert kinds[1].count("title") == kinds[0].count("title")
    assert not any(name.startswith("on") for _, attributes in after.tags for name in attributes)
    assert (
        after.text.count('</script></title><b onclick="x">\'$\\frac{1}{2}$&amp;\\u202e\\n\\ud800{{ 7*7 }}')
        > 8
    )
    hostile.encode()


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("Conv", "Conv"), ("com.microsoft.QuickGelu", "com.microsoft.QuickGelu"), ("Sigmoid+Mul", "Sigmoid+Mul"),
        ("QuantizeLinear/DequantizeLinear around Flatten", "Q/DQ around Flatten"),
        ("$x$", "row 3"), ("<b>", "row 3"), ("", "row 3"), ("a\nb", "row 3"), ("x" * 31, "row 3"), ("é", "row 3"),
    ],
)  # fmt: skip
def test_operators_are_named_where_they_take_time(name, label):
    times = [OperatorTime("A", 1e-3, 2e-3), OperatorTime("B", 1e-3, 2e-3), OperatorTime(name, 1e-3, 1e-3)]
    found = str(plots.operators(times))
    assert f">{label}</text>" in found
    assert (">row 3</text>" in found) == (label == "row 3")


@pytest.mark.parametrize(
    ("seconds", "unit"), [(9e-4, "microseconds"), (2e-3, "milliseconds"), (1, "milliseconds")]
)
def test_times_of_operators_are_in_a_unit_that_suits_them(seconds, unit):
    assert f"{unit} of one run" in str(plots.operators([OperatorTime("A", seconds / 2, seconds)]))


@pytest.mark.parametrize(("size", "unit"), [(900_000, "kB"), (1_100_000, "MB")])
@pytest.mark.parametrize("falls", [True, False])
def test_a_front_is_a_line_only_where_noise_falls_with_the_size(size, unit, falls):
    noises = (0.3, 0.2, 0.1) if falls else (0.3, 0.1, 0.2)
    points = [FrontPoint(noise, bytes=size - 1000 * k) for k, noise in zip((2, 1, 0), noises, strict=True)]
    found = str(plots.front(points))
    assert f"size of the file ({unit})" in found
    lines = re.findall(r'<path d="M[^"]*"[^>]*style="fill: none; stroke: var\(--first\)', found)
    assert len(lines) == int(falls)


def test_a_front_of_activations_has_their_mean_bits():
    points = [FrontPoint(0.1, activation_bits=8.0), FrontPoint(0.01, activation_bits=9.5, chosen=True)]
    assert "mean bits of an activation" in str(plots.front(points))
    sheet = front_sheet(points)
    assert sheet.columns == ("mean bits of an activation", "noise of the activations")
    assert sheet.rows[1] == ("9.50 (chosen)", "1.00%")
    assert sheet.title == "Noise against bits, foreseen"


def test_the_same_report_gives_the_same_bytes(bare):
    found = report(
        layers=(layer(attention=None, own_db=None, nearest_db=None),), front=FRONT, optimization=None
    )
    assert page_of(found) == page_of(found)


def test_500_layers():
    names = tuple(f"block{k}/conv" for k in range(500))
    layers = tuple(layer(name, sqnr_db=30 - k / 25) for k, name in enumerate(names))
    found = Page(page_of(report(layers=layers, exhibits=replace(exhibits(names), histograms=()))))
    assert sum("block" in text for tag, text in found.texts if tag == "td") >= 499
    assert sum(tag == "rect" for tag, _ in found.tags) >= 501
    assert [d for d in found.all("div") if d.get("role") == "region"], "a long table scrolls, by keyboard too"


def test_the_strip_names_each_node_and_why_it_is_float():
    page = Page(
        str(
            strip([NodePlace("a<b", "Conv", "integers", "W4A8"), NodePlace("c", "Erf", "float", "no kernel")])
        )
    )
    tips = [text for tag, text in page.texts if tag == "title"]
    assert tips == ["The network", "1. a<b (Conv), integers: W4A8", "2. c (Erf), float: no kernel"]
    assert [r["class"] for r in page.all("rect")] == ["integers", "float"]


@pytest.mark.parametrize(
    ("shape", "size"), [((4, 2), (64, 128)), ((300, 600), (128, 64)), ((1, 500), (128, 1))]
)
def test_pictures_are_small(shape, size):
    pixels = np.random.default_rng(0).integers(0, 255, (*shape, 3), np.uint8)
    content = base64.b64decode(data_uri(pixels).removeprefix("data:image/png;base64,"))
    image = Image.open(io.BytesIO(content))
    assert image.size == size
    assert data_uri(pixels) == data_uri(pixels)
    if shape == (4, 2):
        np.testing.assert_array_equal(np.asarray(image)[::32, ::32], pixels)
