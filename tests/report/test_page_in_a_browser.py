"""The page in a real browser, where one is found; see `browser.NAMES`."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
from browser import browser, program
from reports import exhibits, layer, report

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(program() is None, reason="no Chromium is found; the variable CHROMIUM names one"),
]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    names = tuple(f"block{k}/conv" for k in range(500))
    layers = tuple(layer(name, sqnr_db=float(k * 7 % 500)) for k, name in enumerate(names))
    report(layers=layers, exhibits=replace(exhibits(names))).save(folder / "report.html")
    with browser(folder / "profile") as found:
        began = time.monotonic()
        found.open(folder / "report.html")
        found.seconds = time.monotonic() - began
        yield found


def test_500_layers_open_within_two_seconds(page):
    assert page.seconds < 2


def test_it_asks_for_nothing_and_complains_about_nothing(page):
    asked = [
        e["params"]["request"]["url"] for e in page.said if e.get("method") == "Network.requestWillBeSent"
    ]
    assert all(url.startswith("data:") for url in asked if not url.endswith("/report.html"))
    assert not [e for e in page.said if e.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded")]


def test_headings_sort(page):
    script = """(() => {
        const table = document.querySelector("#layers ~ div table");
        const heading = [...table.tHead.rows[0].cells].find(h => h.textContent.startsWith("accumulated"));
        const column = heading.cellIndex;
        const found = [];
        for (let k = 0; k < 2; k++) {
            heading.querySelector("button").click();
            found.push([heading.getAttribute("aria-sort"),
                        [...table.tBodies[0].rows].map(r => parseFloat(r.cells[column].textContent))]);
        }
        return found;
    })()"""
    (up, rising), (down, falling) = page.value(script)
    assert (up, down) == ("ascending", "descending")
    assert rising == sorted(rising)
    assert falling == sorted(rising, reverse=True)
    assert len(set(rising)) == 500


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_follows_the_colours_of_the_system(page, scheme):
    assert page.screenshot(scheme=scheme).startswith(b"\x89PNG")
    colour = page.value("getComputedStyle(document.body).backgroundColor")
    assert (colour == "rgb(255, 255, 255)") == (scheme == "light")


@pytest.mark.parametrize("width", [420, 1200])
def test_nothing_is_wider_than_the_window(page, width):
    page.screenshot(width=width)
    assert page.value("document.documentElement.scrollWidth") <= width
