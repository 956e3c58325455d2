"""`tokens.html` in a real browser: offline, two widths, dark and light, hostile texts, hover, keys."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser.chromium import Chromium, find_chromium
from token_models import save_random

import sparsity_audit
from sparsity_audit.lab.language_model import LabTokenizer

pytestmark = pytest.mark.skipif(find_chromium() is None, reason="Chromium is not installed")

HOSTILE = {
    "1": "<script>document.title='run'</script>",
    "2": "</script><img src=http://127.0.0.1:9/x>",
    "3": "\u202e重み",
    "4": "line\nbreak",
    "5": "   ",
}
PROMPTS = "[...document.querySelectorAll('#list article')].map(a => a.dataset.prompt)"


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Chromium]:
    program = find_chromium()
    assert program is not None
    chromium = Chromium(program, tmp_path_factory.mktemp("profile"))
    yield chromium
    chromium.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    """The page of two random models, and the same with token texts that attack it."""
    folder = tmp_path_factory.mktemp("tokens")
    models = save_random(folder / "base", 0), save_random(folder / "tuned", 1)
    made = {}
    options = {"task": "addition", "lengths": (2,), "num_prompts": 6, "page_prompts": 5, "figures": False}
    decode = LabTokenizer.decode
    for name in ("plain", "hostile"):
        if name == "hostile":
            LabTokenizer.decode = lambda self, ids: "".join(HOSTILE.get(c, c) for c in decode(self, ids))
        try:
            sparsity_audit.tokens_diverge(*models, output=folder / name, **options)
        finally:
            LabTokenizer.decode = decode
        made[name] = folder / name / "tokens.html"
    return made


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("which", ["plain", "hostile"])
def test_it_fits_and_neither_complains_nor_asks_for_anything(browser, pages, which, width, scheme) -> None:
    browser.open(pages[which], width=width, scheme=scheme)
    browser.settle()
    assert browser.complaints() == []
    assert browser.requests() == [pages[which].as_uri()]
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate("document.title") == "Which tokens changed"
    assert browser.evaluate("document.images.length") == 0


def test_the_first_prompts_are_shown_base_and_tuned_side_by_side(browser, pages) -> None:
    browser.open(pages["plain"])
    assert browser.evaluate(PROMPTS) == ["0", "1", "2", "3", "4"]
    assert browser.evaluate("document.querySelectorAll('#list .side.base').length") == 5
    boxes = browser.evaluate(
        "['base', 'tuned'].map(s => { const r = document.querySelector('#list .side.' + s)"
        ".getBoundingClientRect(); return [r.left, r.top]; })"
    )
    assert boxes[0][1] == boxes[1][1]
    assert boxes[0][0] < boxes[1][0]
    text = browser.evaluate("document.querySelector('#list .side.tuned .text').textContent")
    assert re.fullmatch(r"(<\w+>|[0-9+=#;SRC])+", text)


def test_pointing_at_a_token_shows_both_distributions(browser, pages) -> None:
    browser.open(pages["plain"])
    place = browser.evaluate(
        "(() => { const s = document.querySelector('#list .text span');"
        "s.scrollIntoView({block: 'center'}); const r = s.getBoundingClientRect();"
        "return [r.x + r.width / 2, r.y + r.height / 2]; })()"
    )
    browser.settle()
    browser.send("Input.dispatchMouseEvent", type="mouseMoved", x=place[0], y=place[1])
    browser.settle()
    assert browser.evaluate("document.querySelector('#card').hidden") is False
    assert browser.evaluate("document.querySelectorAll('#card .two li').length") == 10
    for side in ("base", "tuned"):
        shown = browser.evaluate(
            f"[...document.querySelectorAll('#card .two .{side} em')].map(e => Number(e.textContent))"
        )
        assert shown == sorted(shown, reverse=True)
        assert 0 < sum(shown) <= 1.001
    box = browser.evaluate(
        "(() => { const r = document.querySelector('#card').getBoundingClientRect();"
        "return [r.left, r.top, r.right, r.bottom]; })()"
    )
    assert box[0] >= 0
    assert box[1] >= 0
    assert box[2] <= 1280
    assert box[3] <= 900
    browser.send("Input.dispatchMouseEvent", type="mouseMoved", x=2, y=2)
    browser.settle()
    assert browser.evaluate("document.querySelector('#card').hidden") is True


def test_arrow_keys_walk_through_a_completion(browser, pages) -> None:
    browser.open(pages["plain"])
    browser.evaluate("document.querySelector('#filter').focus()")
    browser.press("Tab")
    title = "document.querySelector('#card h5').textContent"
    assert "position 0:" in browser.evaluate(title)
    for key, code, wanted in (("ArrowRight", 39, 1), ("ArrowRight", 39, 2), ("ArrowLeft", 37, 1)):
        for kind in ("keyDown", "keyUp"):
            browser.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)
        browser.settle()
        assert f"position {wanted}:" in browser.evaluate(title)
    assert browser.evaluate("document.querySelectorAll('#list .text span.at').length") == 1


def test_the_filter_and_the_order_choose_prompts(browser, pages) -> None:
    browser.open(pages["plain"])
    prompt = browser.evaluate("document.querySelectorAll('#list .prompt')[2].textContent")
    browser.click("#filter")
    browser.type(prompt.removeprefix("<bos>"))
    assert browser.evaluate(PROMPTS) == ["2"]
    assert browser.evaluate("document.querySelector('#count').textContent") == "1 of 5 prompts"
    browser.evaluate(
        "(() => { const f = document.querySelector('#filter'); f.value = '';"
        "f.dispatchEvent(new Event('input')); const o = document.querySelector('#order'); o.value = 'mean';"
        "o.dispatchEvent(new Event('input')); })()"
    )
    assert sorted(browser.evaluate(PROMPTS)) == ["0", "1", "2", "3", "4"]


def test_colour_and_mark_follow_the_divergence(browser, pages) -> None:
    browser.open(pages["plain"])
    steps = browser.evaluate("[...document.querySelectorAll('#list .text span')].map(s => s.className)")
    assert len(set(steps)) > 2
    browser.evaluate(
        "(() => { const t = document.querySelector('#threshold'); t.value = '0.1';"
        "t.dispatchEvent(new Event('input')); })()"
    )
    marked = browser.evaluate("document.querySelectorAll('#list .text span.mark').length")
    counted = browser.evaluate(
        "[...document.querySelectorAll('#list h4')]"
        ".reduce((n, h) => n + Number(h.textContent.match(/, (\\d+) with/)[1]), 0)"
    )
    assert marked == counted > 0


def test_hostile_texts_are_shown_as_text(browser, pages) -> None:
    browser.open(pages["hostile"])
    text = browser.evaluate("document.querySelector('#list').textContent")
    assert "<script>document.title='run'</script>" in text
    assert browser.evaluate("document.querySelectorAll('#list script, #list img').length") == 0
