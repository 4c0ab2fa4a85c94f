"""The report in a real browser: it opens without an error or a request, on a desk and on a phone, and works."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.hpo.browser import open_page, why_no_browser
from tests.hpo.commands import hpo

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.skipif(why_no_browser() is not None, reason=str(why_no_browser()))

SPACE = """
data: {name: digits}
base: {model: {widths: [8], blocks: [1]}, epochs: 3, batch_size: 128, augment: {flip: 0.0}}
pruner: {name: rungs, rungs: [0.34], keep: 0.5}
sampler: {name: random}
search:
  optim.name: {choices: [sgd, adamw]}
  optim.lr_scale: {low: 0.5, high: 20, log: true}
  loss.smoothing: {low: 0.0, high: 0.2}
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a small real search."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "space.yaml").write_text(SPACE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HPO_STUDIES", str(folder / "studies"))
        patch.setenv("HPO_CACHE", str(folder / "cache"))
        assert hpo(patch, "run", str(folder / "space.yaml"), "--study", "small", "--trials", "5") == 0
        assert hpo(patch, "report", "small", "-o", str(folder / "report.html")) == 0
    return folder / "report.html"


@pytest.fixture(params=[1400, 400], ids=["desk", "phone"])
def opened(request: pytest.FixtureRequest, report: Path) -> Iterator[tuple[Page, list[str]]]:
    """The page, and what went wrong in it so far: errors, and requests for anything but the page itself."""
    with open_page("about:blank", width=request.param) as page:
        wrong: list[str] = []
        page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
        page.on("console", lambda said: wrong.append(f"console: {said.text}") if said.type != "log" else None)
        address = report.as_uri()
        page.on("request", lambda asked: wrong.append(f"request: {asked.url}") if _leaves(asked.url, address) else None)
        page.route(re.compile("^https?:"), lambda route: route.abort())
        page.goto(address, wait_until="load")
        yield page, wrong


def _leaves(url: str, own: str) -> bool:
    """Whether a request asks for something that is not in the page."""
    return url.partition("#")[0] != own and not url.startswith(("data:", "blob:"))


def test_the_report_opens_and_works_without_an_error_or_a_request(opened: tuple[Page, list[str]]) -> None:
    page, wrong = opened
    assert page.locator("main > section").count() > 8
    for section in page.locator("main > section").all():
        section.scroll_into_view_if_needed()
        assert section.is_visible()
        assert section.locator("h2").inner_text()

    # Every figure is drawn as it comes near; none is an empty box.
    figures = page.locator("figure.plot")
    for at in range(figures.count()):
        figures.nth(at).scroll_into_view_if_needed()
        figures.nth(at).locator(".main-svg").first.wait_for(state="visible")

    # Nothing makes the page itself scroll sideways.
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")

    # A link of the navigation leads to its section.
    page.locator("nav a", has_text="History").click()
    page.wait_for_function("Math.abs(document.getElementById('history').getBoundingClientRect().top) < 150")

    # The pointer at a trial says which it is.
    plot = page.locator("#history .js-plotly-plot")
    mark = plot.locator(".trace.scatter .points path").last.bounding_box()
    assert mark is not None
    page.mouse.move(mark["x"] + mark["width"] / 2, mark["y"] + mark["height"] / 2)
    label = plot.locator(".hoverlayer .hovertext")
    label.first.wait_for(state="visible")
    assert re.search(r"trial \d", label.first.text_content() or "")

    assert wrong == []


def test_the_printed_report_shows_every_figure(report: Path, tmp_path: Path) -> None:
    with open_page(report.as_uri()) as page:
        page.pdf(path=tmp_path / "report.pdf", format="A4")
        drawn = page.evaluate("[...document.querySelectorAll('figure.plot')].map(f => !!f.querySelector('.main-svg'))")
    assert drawn
    assert all(drawn)
    assert (tmp_path / "report.pdf").stat().st_size > 50_000
