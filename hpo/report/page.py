"""The parts of a report page: sections, text, tables, pictures and figures, rendered by Jinja templates.

The page is one HTML file that loads nothing from the network. Figures near the screen are drawn first, so that a page
of many figures opens at once. The colors are those of Okabe and Ito (2008), which color-blind readers can distinguish;
figures add symbols or dashes, so that they can be read in grey.
"""

from __future__ import annotations

import base64
import functools
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import plotly.graph_objects as go
from markupsafe import Markup, escape
from plotly.utils import PlotlyJSONEncoder

from core.text import printable_lines
from hpo.dashboard.pictures import BLUE, GREEN, GREY, INK, ORANGE, PALE, PINK, SKY, YELLOW

SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star", "triangle-down")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
COLORS = (BLUE, ORANGE, GREEN, PINK, SKY, YELLOW, INK)
"""The colors of the template; `SYMBOLS` and `DASHES` are used in the same order."""
SHADES = [[0.0, "#B5D4EA"], [0.4, SKY], [0.7, BLUE], [1.0, "#002B45"]]
"""A color scale from pale to dark blue, whose order can be read in grey."""

_DIGITS = 6  # significant digits of the numbers in a figure: more than a screen of 10,000 pixels can show
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


@dataclass(frozen=True)
class Section:
    """A part of the page with a heading and an entry in the navigation."""

    id: str
    """Letters, digits and hyphens; links point to it."""
    title: str
    lead: str
    """One or two sentences of plain text, in which `…` is code."""
    body: Markup
    short: str = ""
    """The title in the navigation; empty for the title itself."""


def section(id: str, title: str, lead: str, *parts: str | Iterable[str], short: str = "") -> Section:
    """Build a section from HTML, sentences that become paragraphs, and sequences of both; empty ones are left out."""
    flat = [each for part in parts for each in ([part] if isinstance(part, str) else part) if each]
    html = [each if isinstance(each, Markup) else paragraph(each) for each in flat]
    return Section(id, title, lead, Markup("\n").join(html), short)


def page(title: str, sections: Sequence[Section], *, subtitle: str = "", footer: Sequence[str] = ()) -> str:
    """Render the whole HTML file from sections and plain text."""
    drawn = any('<div class="canvas"' in each.body for each in sections)
    return _environment().get_template("page.html.j2").render(
        title=title, sections=sections, subtitle=subtitle, footer=footer, plotly=_plotly_js() if drawn else ""
    )  # fmt: skip


def _plotly_js() -> Markup:
    from plotly.offline import get_plotlyjs

    # Inside a script element these two would end it or change how it is parsed.
    return Markup(get_plotlyjs().replace("</script", "<\\/script").replace("<!--", "<\\!--"))


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hpo.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: printable_lines(value) if type(value) is str else value,
    )
    environment.filters |= {"inline": _inline, "base64": _base64}
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    return environment


def _inline(text: object) -> Markup:
    """Escape the text and turn `…` into code; None is empty."""
    shown = escape("" if text is None else printable_lines(str(text)))
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(shown)))


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _block(name: str) -> Callable[..., Markup]:
    """A macro of the template, as a function that returns HTML."""
    macro: Callable[..., Markup] = getattr(_environment().get_template("blocks.html.j2").module, name)
    return macro


paragraph, note, heading, listing, code, folded = map(
    _block, ("paragraph", "note", "heading", "listing", "code", "folded")
)
table, tiles, columns, side_by_side, picture = map(_block, ("table", "tiles", "columns", "side_by_side", "picture"))


def figure(fig: go.Figure, *, alt: str, height: int = 420, min_width: int | None = None) -> Markup:
    """A plotly figure in the template of all figures, as wide as the page, or `min_width` and scrolled.

    Args:
        fig: has titles with units on its axes and none of its own; it is not changed.
        alt: description for readers who cannot see it.
        height: in CSS pixels.
        min_width: in CSS pixels.
    """
    content = fig.to_plotly_json()
    layout = {key: value for key, value in content["layout"].items() if key not in ("title", "width", "height")}
    layout |= {"template": template(), "autosize": True}
    return _block("figure")(plain({"data": content["data"], "layout": layout}), alt, height, min_width)


def plain(value: Any) -> Any:
    """Convert a figure's content to JSON values: arrays to lists, floats rounded, not finite to None."""
    return json.loads(PlotlyJSONEncoder().encode(value), parse_float=lambda text: float(f"{float(text):.{_DIGITS}g}"))


@functools.cache
def template() -> dict[str, Any]:
    """The template of all figures: dark on white, a pale grid, the legend above the plot."""
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
        colorscale={"sequential": SHADES},
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
