"""`report.html` in a real browser: it works offline, at two widths, dark and light, with hostile names."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from browser.chromium import Chromium, find_chromium

import sparsity_audit
from sparsity_audit.report.html import render_html
from sparsity_audit.report.schema import DiffReport

pytestmark = pytest.mark.skipif(find_chromium() is None, reason="Chromium is not installed")

NUM_TENSORS = 5000
HOSTILE = (
    "<script>document.title='run'</script>",
    "</script><img src=http://127.0.0.1:9/x>",
    "y" * 2000,
    "重み\u202e",
)
ROWS = "[...document.querySelectorAll('#tensor-table tbody tr:not(.pad)')]"
NAMES = f"{ROWS}.map(row => row.cells[0].textContent)"
COUNT = "document.querySelector('#tensor-count').textContent"


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Chromium]:
    program = find_chromium()
    assert program is not None
    chromium = Chromium(program, tmp_path_factory.mktemp("profile"))
    yield chromium
    chromium.close()


@pytest.fixture(scope="module")
def report(addition: Path) -> DiffReport:
    return sparsity_audit.diff(
        addition / "base-fp32", addition / "grpo-fp32-seed0", kernel="numpy", workers=1
    )


@pytest.fixture(scope="module")
def page(report, tmp_path_factory) -> Path:
    rng = np.random.default_rng(0)
    axes = {
        f"{t.name}.{axis}": rng.integers(0, 40, 300).astype(np.uint32)
        for t in report.tensors[:8]
        for axis in ("rows", "cols")
    }
    return _write(tmp_path_factory.mktemp("page"), render_html(report, axes=axes))


@pytest.fixture(scope="module")
def hostile_page(report, tmp_path_factory) -> Path:
    names = [*HOSTILE, *(f"model.layers.{n}.mlp.{n % 7}.weight" for n in range(NUM_TENSORS - len(HOSTILE)))]
    tensors = tuple(
        dataclasses.replace(report.tensors[n % len(report.tensors)], name=name, tuned_name=name)
        for n, name in enumerate(names)
    )
    hostile = dataclasses.replace(
        report,
        tensors=tensors,
        findings=HOSTILE,
        tuned=dataclasses.replace(report.tuned, resolved=HOSTILE[2], notes=HOSTILE),
    )
    return _write(tmp_path_factory.mktemp("hostile"), render_html(hostile, axes={}))


def _write(folder: Path, data: bytes) -> Path:
    path = folder / "report.html"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("which", ["page", "hostile_page"])
def test_it_fits_and_neither_complains_nor_asks_for_anything(browser, request, which, width, scheme) -> None:
    path = request.getfixturevalue(which)
    browser.open(path, width=width, scheme=scheme)
    browser.settle()
    assert browser.complaints() == []
    assert browser.requests() == [path.as_uri()]
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    assert "run" not in browser.evaluate("document.title").split()
    assert browser.evaluate("document.images.length") == 0


def test_the_head_sorts_by_click_and_by_keyboard(browser, page, report) -> None:
    browser.open(page)
    assert browser.evaluate(NAMES)[0] == report.tensors[0].name
    browser.click("[data-column=entries] button")
    largest = max(tensor.entries for tensor in report.tensors)
    assert browser.evaluate(f"{ROWS}[0].cells[6].textContent") == f"{largest:,}"
    assert browser.evaluate("document.querySelector('[data-column=entries]').ariaSort") == "descending"
    browser.evaluate("document.querySelector('[data-column=entries] button').focus()")
    browser.press("Enter")
    smallest = min(tensor.entries for tensor in report.tensors)
    assert browser.evaluate(f"{ROWS}[0].cells[6].textContent") == f"{smallest:,}"
    assert browser.evaluate("document.querySelector('[data-column=entries]').ariaSort") == "ascending"


def test_filters_leave_the_rows_that_match(browser, page, report) -> None:
    browser.open(page)
    browser.click("#filter-text")
    browser.type("q_proj")
    wanted = [t.name for t in report.tensors if "q_proj" in t.name]
    assert browser.evaluate(NAMES) == wanted
    assert browser.evaluate(COUNT).startswith(f"{len(wanted)} of {len(report.tensors)} tensors")
    browser.evaluate("document.querySelector('#filter-text').select()")
    browser.click("#filter-regex")
    browser.evaluate("document.querySelector('#filter-text').focus()")
    browser.type(r"layers\.[02]\..*norm")
    assert all("norm" in name and ".1." not in name for name in browser.evaluate(NAMES))
    browser.type("(")
    assert "not a regular expression" in browser.evaluate(COUNT)
    browser.evaluate(
        "(() => { for (const id of ['filter-text', 'filter-kind']) {"
        "const e = document.getElementById(id); e.value = id === 'filter-kind' ? '=norm' : '';"
        "e.dispatchEvent(new Event('input')); } })()"
    )
    kinds = browser.evaluate(f"{ROWS}.map(row => row.cells[3].textContent)")
    assert set(kinds) == {"norm"}
    assert len(kinds) == sum(t.summary.kind == "norm" for t in report.tensors)


def test_the_view_and_criterion_change_the_counts(browser, page, report) -> None:
    browser.open(page)
    browser.evaluate(
        "(() => { for (const [id, value] of [['tensor-view', 'served'], ['tensor-criterion', 'atol:1e-5']]) {"
        "const e = document.getElementById(id); e.value = value; e.dispatchEvent(new Event('input')); } })()"
    )
    shown = browser.evaluate(f"{ROWS}.map(row => row.cells[7].textContent)")
    counts = [
        next(c.changed for c in t.summary.served.counts if c.criterion == "atol:1e-5") for t in report.tensors
    ]
    assert shown == [f"{count:,}" for count in counts[: len(shown)]]


def test_thousands_of_tensors_are_drawn_a_window_at_a_time(browser, hostile_page) -> None:
    browser.open(hostile_page)
    assert browser.evaluate(f"{ROWS}.length") < 60
    assert browser.evaluate(NAMES)[:4] == list(HOSTILE)
    browser.evaluate("document.querySelector('#tensor-window').scrollTop = 1e9")
    browser.settle()
    assert (
        browser.evaluate(NAMES)[-1]
        == f"model.layers.{NUM_TENSORS - len(HOSTILE) - 1}.mlp.{(NUM_TENSORS - 5) % 7}.weight"
    )
    assert browser.evaluate(f"{ROWS}.length") < 60
    last = browser.evaluate(f"{ROWS}.at(-1).ariaRowIndex")
    assert last == str(NUM_TENSORS + 1)


def test_a_name_shows_everything_known_of_its_tensor(browser, page, report) -> None:
    browser.open(page)
    browser.click("#tensor-table tbody tr:not(.pad) button")
    text = browser.evaluate("document.querySelector('#tensor-detail').textContent")
    tensor = report.tensors[0]
    for part in (
        tensor.name,
        tensor.base_fingerprint,
        tensor.tuned_fingerprint,
        str(tensor.summary.native.l2),
    ):
        assert part in text


def test_any_included_matrix_can_be_mapped(browser, page) -> None:
    browser.open(page)
    assert browser.evaluate("document.querySelectorAll('#map-view .map').length") == 3
    browser.evaluate(
        "(() => { const e = document.querySelector('#map-choice'); e.value = '4';"
        "e.dispatchEvent(new Event('change')); })()"
    )
    chosen = browser.evaluate("document.querySelector('#map-choice').selectedOptions[0].textContent")
    assert browser.evaluate("document.querySelector('#map-view h3').textContent") == chosen
    assert browser.evaluate("document.querySelectorAll('#map-view .map').length") == 1
    assert browser.evaluate("document.querySelectorAll('#map-view rect').length") == 256


def test_the_theme_follows_the_system_until_a_button_says_otherwise(browser, page) -> None:
    colour = "getComputedStyle(document.body).backgroundColor"
    browser.open(page, scheme="dark")
    dark = browser.evaluate(colour)
    browser.open(page, scheme="light")
    light = browser.evaluate(colour)
    assert dark != light
    browser.click("button[data-theme=dark]")
    assert browser.evaluate(colour) == dark
    browser.click("button[data-theme=auto]")
    assert browser.evaluate(colour) == light


def test_print_shows_the_rows_without_a_window(browser, page, report) -> None:
    browser.open(page, scheme="dark")
    browser.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert browser.evaluate(f"{ROWS}.length") == len(report.tensors)
    browser.send("Emulation.setEmulatedMedia", media="print", features=[])
    assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    browser.send("Emulation.setEmulatedMedia", media="", features=[])
