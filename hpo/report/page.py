"""The parts that a report's page is made of: sections, figures, pictures, tables, words.

The page is one HTML file that asks for nothing: plotly.js stands in it once, figures are JSON beside the place where
they are drawn, pictures are data, and a content security policy forbids the browser to fetch anything. A figure is
drawn when it comes near the screen, and before printing, so that a page of many figures opens at once.

Every figure has one template. Its colours are those of Okabe and Ito (2008), which colour-blind people can tell apart;
whoever draws a figure gives symbols or dashes beside them, so that it can be read in grey too.
"""

from __future__ import annotations

import base64
import functools
import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go

from hpo.dashboard.pictures import BLUE, GREEN, GREY, INK, ORANGE, PALE, PINK, SKY, YELLOW

DIGITS = 6
"""Significant digits of the numbers in a figure: more than a screen of 10,000 pixels can show."""

SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star", "triangle-down")
"""What tells series of points apart without colour, in the order of the template's colours."""
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
"""What tells lines apart without colour, in the order of the template's colours."""
COLORS = (BLUE, ORANGE, GREEN, PINK, SKY, YELLOW, INK)
"""The template's colours."""

_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"

# What a browser may do with the page: run what stands in it, and fetch nothing at all. Plotly copies a figure into a
# `blob:` to save it as a picture.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; "
    "form-action 'none'; base-uri 'none'"
)


@dataclass(frozen=True)
class Section:
    """A part of the page with a heading and a place in the navigation."""

    id: str
    """Of letters, digits and hyphens: what a link to it is made of."""
    title: str
    lead: str
    """One or two sentences that say what is seen: plain text, in which `…` is code."""
    body: str
    """HTML, as the functions of this module return it."""
    short: str = ""
    """The title in the navigation; the title itself where empty."""


def page(title: str, sections: Sequence[Section], *, under: str = "", foot: str = "") -> str:
    """The whole file.

    Args:
        title: plain text, of the page and its first heading.
        under: plain text below the first heading.
        foot: HTML below all sections.
    """
    return _TEMPLATE.format(
        policy=_POLICY,
        title=escaped(title),
        under=_inline(under),
        style=_resource("page.css"),
        links="".join(f'<li><a href="#{each.id}">{escaped(each.short or each.title)}</a></li>' for each in sections),
        sections="\n".join(map(_section, sections)),
        foot=foot,
        plotly=_plotly_js() if any(_CANVAS in each.body for each in sections) else "",
        script=_resource("page.js"),
    )


_CANVAS = '<div class="canvas"'

_TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>
{style}</style>
</head>
<body>
<header><h1>{title}</h1><p class="note">{under}</p></header>
<nav aria-label="Sections"><ul>{links}</ul></nav>
<noscript><p class="warning">The figures are drawn by JavaScript, which is switched off here.</p></noscript>
<main>
{sections}
</main>
<footer>{foot}</footer>
<script>{plotly}</script>
<script>
{script}</script>
</body>
</html>
"""


def _section(section: Section) -> str:
    return (
        f'<section id="{section.id}" aria-labelledby="{section.id}-title">\n'
        f'<h2 id="{section.id}-title">{escaped(section.title)}</h2>\n'
        f'<p class="lead">{_inline(section.lead)}</p>\n{section.body}\n</section>'
    )


def _resource(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _plotly_js() -> str:
    from plotly.offline import get_plotlyjs

    source = get_plotlyjs()
    # Inside a script element these two would end it, or change how it is read.
    return str(source).replace("</script", "<\\/script").replace("<!--", "<\\!--")


# Words and tables ---------------------------------------------------------------------------------------------------


def escaped(text: object) -> str:
    """The text as HTML."""
    return html.escape(str(text))


def _inline(text: str) -> str:
    """The text as HTML, with what stands between backticks as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escaped(text))


def paragraph(text: str, *, kind: str = "") -> str:
    """A paragraph of plain text, in which `…` is code.

    Args:
        kind: a class of the style sheet: `note` for what is said in small letters, `warning` for what is wrong.
    """
    return f"<p{_class(kind)}>{_inline(text)}</p>"


def heading(text: str) -> str:
    """A heading inside a section."""
    return f"<h3>{_inline(text)}</h3>"


def listing(lines: Sequence[str]) -> str:
    """A list with a bullet a line; in each, `…` is code."""
    return f"<ul>{''.join(f'<li>{_inline(line)}</li>' for line in lines)}</ul>"


def code(text: str) -> str:
    """Lines to be copied as they are: a command, YAML."""
    return f"<pre><code>{escaped(text)}</code></pre>"


def folded(summary: str, body: str) -> str:
    """HTML that is shown once the summary, plain text, is clicked; printed always."""
    return f"<details><summary>{_inline(summary)}</summary>{body}</details>"


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], *, right: Sequence[int] = ()) -> str:
    """A table of plain text; wider than the screen, it scrolls in its own box.

    Args:
        rows: cells of `None` are empty.
        right: the columns that are set to the right, as numbers are.
    """

    def cell(tag: str, column: int, value: object) -> str:
        scope = ' scope="col"' if tag == "th" else ""
        return f"<{tag}{scope}{_class('right' if column in right else '')}>{_inline(_text(value))}</{tag}>"

    def row(tag: str, values: Sequence[object]) -> str:
        return f"<tr>{''.join(cell(tag, column, value) for column, value in enumerate(values))}</tr>"

    body = "\n".join(row("td", values) for values in rows)
    # The box can be reached by the keyboard, and so be scrolled by it.
    return (
        f'<div class="scroll" tabindex="0" role="group" aria-label="Table"><table><thead>{row("th", columns)}</thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def _text(value: object) -> str:
    return "" if value is None else str(value)


def _class(name: str) -> str:
    return f' class="{name}"' if name else ""


# Pictures and figures -----------------------------------------------------------------------------------------------


def picture(png: bytes, *, alt: str, width: int | None = None) -> str:
    """A PNG, in the page itself, never wider than the screen.

    Args:
        alt: what is to be seen, for who cannot see it.
        width: in CSS pixels; None is the picture's own.
    """
    data = base64.b64encode(png).decode()
    size = "" if width is None else f' width="{width}"'
    return f'<figure class="picture"><img src="data:image/png;base64,{data}" alt="{escaped(alt)}"{size}></figure>'


def figure(fig: go.Figure, *, alt: str, height: int = 420, min_width: int | None = None) -> str:
    """A plotly figure in the house's template, as wide as the page. The figure itself is not changed.

    Give axes a title with a unit, and the figure none: the section's heading and lead say what is seen.

    Args:
        alt: what is to be seen, for who cannot see it.
        height: in CSS pixels.
        min_width: in CSS pixels; where the screen is narrower, the figure scrolls in its own box.
    """
    content = fig.to_plotly_json()  # a copy
    layout = {key: value for key, value in content["layout"].items() if key not in ("title", "width", "height")}
    drawn = plain({"data": content["data"], "layout": layout | {"template": template(), "autosize": True}})
    # "<" is escaped, so that no text in the figure can end the script element.
    text = json.dumps(drawn, allow_nan=False, separators=(",", ":"))
    style = f"height:{height}px" + (f";min-width:{min_width}px" if min_width else "")
    scroll = ' tabindex="0"' if min_width else ""  # reached, and so scrolled, by the keyboard
    return (
        f'<figure class="plot" role="img" aria-label="{escaped(alt)}"{scroll}>{_CANVAS} style="{style}"></div>'
        f'<script type="application/json">{text.replace("<", chr(92) + "u003c")}</script></figure>'
    )


def tiles(items: Sequence[tuple[str, str, Sequence[str]]]) -> str:
    """Boxes side by side, each a question, its answer in large letters, and lines of plain text below."""
    boxes = (
        f'<div class="tile"><h3>{_inline(question)}</h3><p class="big">{_inline(answer)}</p>'
        f"{''.join(map(paragraph, lines))}</div>"
        for question, answer, lines in items
    )
    return f'<div class="tiles">{"".join(boxes)}</div>'


def columns(*parts: str) -> str:
    """HTML side by side where the screen has room, one below the other where not."""
    return f'<div class="columns">{"".join(f"<div>{part}</div>" for part in parts if part)}</div>'


def side_by_side(figures: Sequence[str]) -> str:
    """Figures in as many columns as the screen has room for."""
    return f'<div class="grid">{"".join(figures)}</div>'


def plain(value: Any) -> Any:
    """A figure's content as plain JSON: arrays as lists, numbers of `DIGITS` digits, what is not finite as null."""
    if isinstance(value, np.ndarray):
        return [plain(item) for item in value.tolist()]
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, int | np.integer):
        return int(value)
    if isinstance(value, float | np.floating):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value


@functools.cache
def template() -> dict[str, Any]:
    """How all figures look: dark on white, a pale grid, the legend above the plot where it covers nothing."""
    axis = {
        "automargin": True,
        "gridcolor": PALE,
        "linecolor": GREY,
        "showline": True,
        "ticks": "outside",
        "ticklen": 4,
        "tickcolor": GREY,
        "zeroline": False,
        "title": {"standoff": 8},
    }
    layout = go.Layout(
        colorway=list(COLORS),
        colorscale={"sequential": shades()},
        font={"family": _FONT, "size": 13, "color": INK},
        paper_bgcolor="white",
        plot_bgcolor="white",
        margin={"l": 56, "r": 16, "t": 16, "b": 48},
        hovermode="closest",
        hoverlabel={"bgcolor": "white", "bordercolor": GREY, "font": {"color": INK, "family": _FONT}, "align": "left"},
        legend={"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom", "font": {"size": 12}},
        xaxis=axis,
        yaxis=axis,
    )
    checked: dict[str, Any] = go.layout.Template(layout=layout).to_plotly_json()
    return checked


def shades() -> list[list[Any]]:
    """A scale from pale to dark blue: its order is read in grey as well."""
    return [[0.0, "#B5D4EA"], [0.4, SKY], [0.7, BLUE], [1.0, "#002B45"]]
