"""Pictures of a report, a section each: `python -m tests.hpo.dashboard.screenshots REPORT.html FOLDER`.

Each section is taken at 1400 and at 400 CSS pixels, as `<section>-1400.png` and `<section>-400.png`, with 128 colours,
which plots do not miss. `--grey` takes them as a black-and-white printer would.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from tests.hpo.browser import open_page

if TYPE_CHECKING:
    from playwright.sync_api import Page

WIDTHS = (1400, 400)
COLORS = 128
LONGEST = 2400
"""CSS pixels of a picture's height: longer sections are cut."""


def section_pictures(report: Path, width: int) -> Iterator[tuple[str, bytes]]:
    """(the section's id, a PNG of it) in the page's order, drawn in full."""
    with open_page(report.resolve().as_uri(), width=width, height=900) as page:
        draw_all(page)
        # The navigation stays on the screen; in a picture of one section it would lie over the text.
        page.add_style_tag(content="nav { position: static !important; }")
        for section in page.query_selector_all("main > section"):
            name = section.get_attribute("id") or ""
            box = section.bounding_box()
            assert box is not None, f"section {name} is not visible"
            clip = {"x": 0, "y": box["y"], "width": width, "height": min(box["height"], LONGEST)}
            yield name, page.screenshot(clip=clip, full_page=True)


def draw_all(page: Page) -> None:
    """Scrolls through the page, so that every figure is drawn, and waits for it."""
    page.evaluate("document.querySelectorAll('figure.plot').forEach((each) => draw(each))")
    page.wait_for_function("[...document.querySelectorAll('figure.plot')].every(f => f.querySelector('.main-svg'))")
    page.wait_for_timeout(500)


def quantised(png: bytes, *, grey: bool) -> bytes:
    """The same picture in few colours, or in none."""
    image = Image.open(io.BytesIO(png)).convert("L" if grey else "RGB")
    if not grey:
        image = image.quantize(COLORS, dither=Image.Dither.NONE)
    out = io.BytesIO()
    image.save(out, "PNG", optimize=True)
    return out.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description="Takes a picture of every section of a report.")
    parser.add_argument("report", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--grey", action="store_true", help="without colours, as a printer may print it")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    for width in WIDTHS:
        for name, png in section_pictures(options.report, width):
            file = options.folder / f"{name}-{width}.png"
            file.write_bytes(quantised(png, grey=options.grey))
            print(f"{file} {file.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
