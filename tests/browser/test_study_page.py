"""`index.html` of a study in a real browser: offline, without script, at two widths, dark and light."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from browser.chromium import Chromium, find_chromium
from study_runs import smoke_study

from sparsity_audit.report.study import StudyReport

pytestmark = [
    pytest.mark.skipif(find_chromium() is None, reason="Chromium is not installed"),
    pytest.mark.timeout(900),
]


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> tuple[StudyReport, Path]:
    return smoke_study(tmp_path_factory)


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Chromium]:
    program = find_chromium()
    assert program is not None
    chromium = Chromium(program, tmp_path_factory.mktemp("profile"))
    yield chromium
    chromium.close()


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_and_neither_complains_nor_asks_for_anything(browser, study, width, scheme) -> None:
    page = study[1] / "index.html"
    browser.open(page, width=width, scheme=scheme)
    browser.settle()
    assert browser.complaints() == []
    assert browser.requests() == [page.as_uri()]
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    assert browser.evaluate("document.scripts.length") == 0


def test_it_shows_each_claim_with_its_verdict_and_figure(browser, study) -> None:
    report, folder = study
    browser.open(folder / "index.html", width=1280)
    rows = "[...document.querySelectorAll('#verdicts tbody tr')]"
    assert browser.evaluate(f"{rows}.map(row => row.cells[2].textContent.trim())") == [
        claim.verdict for claim in report.claims
    ]
    assert browser.evaluate(f"{rows}.map(row => row.cells[0].textContent.trim())") == [
        claim.title for claim in report.claims
    ]
    drawn = browser.evaluate(
        "[...document.querySelectorAll('.plot')].map(plot => plot.getBoundingClientRect().height)"
    )
    assert len(drawn) == len(list((folder / "figures").glob("*.svg")))
    assert min(drawn) > 100


def test_no_two_elements_of_the_page_have_one_id(browser, study) -> None:
    browser.open(study[1] / "index.html")
    ids = browser.evaluate("[...document.querySelectorAll('[id]')].map(element => element.id)")
    sections = [name for name in ids if name.count("-") == 0]
    assert len(sections) == len(set(sections))
    missing = browser.evaluate(
        "[...document.querySelectorAll('use')].filter(use =>"
        "!document.getElementById((use.getAttribute('href') || use.getAttribute('xlink:href')).slice(1)))"
        ".length"
    )
    assert missing == 0
