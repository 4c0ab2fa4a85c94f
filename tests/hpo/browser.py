"""A headless Chromium for tests and for the README's pictures: `python -m tests.hpo.browser URL OUT.png`.

Playwright drives the installed Chromium; none is downloaded.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

# Headless, also as root in a container, without updates or sync.
_ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def why_no_browser() -> str | None:
    """Why there is no browser here; None if there is one."""
    if _chromium() is None:
        return "no Chromium on this machine"
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        return "the Python package playwright is not installed"
    return None


def _chromium() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return next((path for name in names if (path := shutil.which(name))), None)


@contextmanager
def open_browser() -> Iterator[Browser]:
    """Start the browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=_chromium(), args=_ARGUMENTS)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def open_page(
    url: str, *, width: int = 1400, height: int = 900, scale: float = 1.0, browser: Browser | None = None
) -> Iterator[Page]:
    """Open an address. Pages that draw themselves are not drawn yet: wait for the elements that matter.

    Args:
        url: the address.
        width: of the window, in CSS pixels.
        height: of the window, in CSS pixels.
        scale: pixels of a screenshot per CSS pixel.
        browser: a running browser; None starts one for this page.
    """
    with ExitStack() as stack:
        browser = browser or stack.enter_context(open_browser())
        page = browser.new_page(viewport={"width": width, "height": height}, device_scale_factor=scale)
        stack.callback(page.close)
        page.set_default_timeout(60_000)  # milliseconds: a busy machine is slow to draw
        page.goto(url, wait_until="load")
        yield page


def screenshot(
    url: str, out: Path, *, width: int = 1400, height: int = 900, scale: float = 1.0, wait_for: str | None = None
) -> None:
    """Write a screenshot of an address as PNG, once `wait_for`, a CSS or text selector, is visible."""
    with open_page(url, width=width, height=height, scale=scale) as page:
        if wait_for is not None:
            page.wait_for_selector(wait_for)
        page.wait_for_load_state("networkidle")
        page.wait_for_function("[...document.images].every(image => image.complete)")
        page.wait_for_timeout(1500)  # plots are animated
        page.screenshot(path=out)


def main() -> None:
    parser = argparse.ArgumentParser(description="Takes a picture of a page in headless Chromium.")
    parser.add_argument("url")
    parser.add_argument("out", type=Path)
    parser.add_argument("--width", type=int, default=1400)
    parser.add_argument("--height", type=int, default=900)
    parser.add_argument("--scale", type=float, default=1.0, help="pixels per CSS pixel")
    parser.add_argument("--wait-for", help="a selector that must be visible first, as in text=Hyperparameter")
    options = parser.parse_args()
    screenshot(**vars(options))


if __name__ == "__main__":
    main()
