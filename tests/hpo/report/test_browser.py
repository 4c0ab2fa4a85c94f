"""The report in a real browser: it opens and works without errors or requests, on a desktop and on a phone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hpo.analysis.study_data import StudyData
from hpo.report import write_report
from tests.hpo.browser import open_page, why_no_browser

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.skipif(why_no_browser() is not None, reason=str(why_no_browser()))


@pytest.fixture(scope="module")
def report(real: StudyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a small real search."""
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(real.study, path)
    return path


@pytest.fixture(params=[1400, 400], ids=["desktop", "phone"])
def opened(request: pytest.FixtureRequest, report: Path, browser: Browser) -> Iterator[tuple[Page, list[str]]]:
    """The page, and its errors so far: JavaScript errors, console messages, and requests to other addresses."""
    with open_page("about:blank", width=request.param, browser=browser) as page:
        wrong: list[str] = []
        page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
        page.on("console", lambda said: wrong.append(f"console: {said.text}") if said.type != "log" else None)
        address = report.as_uri()
        page.on("request", lambda asked: wrong.append(f"request: {asked.url}") if _leaves(asked.url, address) else None)
        page.route(re.compile("^https?:"), lambda route: route.abort())
        page.goto(address, wait_until="load")
        yield page, wrong


def _leaves(url: str, own: str) -> bool:
    """Whether a request is for something outside the page."""
    return url.partition("#")[0] != own and not url.startswith(("data:", "blob:"))


def test_the_report_opens_and_works_without_an_error_or_a_request(opened: tuple[Page, list[str]]) -> None:
    page, wrong = opened
    assert page.locator("main > section").count() > 8
    for section in page.locator("main > section").all():
        section.scroll_into_view_if_needed()
        assert section.is_visible()
        assert section.locator("h2").inner_text()

    # Every figure is drawn when it comes near the screen.
    figures = page.locator("figure.plot")
    for at in range(figures.count()):
        figures.nth(at).scroll_into_view_if_needed()
        figures.nth(at).locator(".main-svg").first.wait_for(state="visible")

    # The page itself does not scroll sideways.
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")

    # A link in the navigation leads to its section.
    page.locator("nav a", has_text="History").click()
    page.wait_for_function("Math.abs(document.getElementById('history').getBoundingClientRect().top) < 150")

    # The label at the pointer names the trial.
    plot = page.locator("#history .js-plotly-plot")
    mark = plot.locator(".trace.scatter .points path").last.bounding_box()
    assert mark is not None
    page.mouse.move(mark["x"] + mark["width"] / 2, mark["y"] + mark["height"] / 2)
    label = plot.locator(".hoverlayer .hovertext")
    label.first.wait_for(state="visible")
    assert re.search(r"trial \d", label.first.text_content() or "")

    assert wrong == []


def test_the_printed_report_shows_every_figure(report: Path, browser: Browser, tmp_path: Path) -> None:
    with open_page(report.as_uri(), browser=browser) as page:
        page.pdf(path=tmp_path / "report.pdf", format="A4")
        drawn = page.evaluate("[...document.querySelectorAll('figure.plot')].map(f => !!f.querySelector('.main-svg'))")
    assert drawn
    assert all(drawn)
    assert (tmp_path / "report.pdf").stat().st_size > 50_000


def test_every_figure_is_drawn_without_scrolling(opened: tuple[Page, list[str]]) -> None:
    page, _ = opened
    every = "() => [...document.querySelectorAll('figure.plot')].every((figure) => figure.querySelector('.main-svg'))"
    page.wait_for_function(every)


def test_boxes_that_are_wider_than_the_screen_say_that_they_scroll(opened: tuple[Page, list[str]]) -> None:
    page, _ = opened
    found = page.evaluate("""() => [...document.querySelectorAll(".scroll, .plot[tabindex]")]
        .filter((box) => box.checkVisibility())
        .map((box) => [box.scrollWidth > box.clientWidth, getComputedStyle(box, "::before").content])""")
    hints = {wider: {hint for is_wider, hint in found if is_wider == wider} for wider in (True, False)}
    assert hints[False] == {"none"}
    assert hints[True] == ({'"scroll sideways for more →"'} if page.evaluate("innerWidth") == 400 else set())
