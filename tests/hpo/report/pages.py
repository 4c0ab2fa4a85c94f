"""What is on a page, for assertions: its text, its tables, its figures, and whether it is well-formed."""

from __future__ import annotations

import html
import json
import re
from html.parser import HTMLParser
from typing import Any

from hpo.report.page import Section


def plain(markup: str) -> str:
    """The words of HTML."""
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", markup)).replace("\xa0", " "))


def lead_of(section: Section | None) -> str:
    assert section is not None
    return section.lead


def text_of(section: Section | None) -> str:
    """The section's words, without its figures."""
    assert section is not None
    return plain(f"{section.title} {section.lead} {re.sub(r'<script.*?</script>', ' ', section.body, flags=re.DOTALL)}")


def figures_of(content: Section | str | None) -> list[dict[str, Any]]:
    """The content of each figure."""
    assert content is not None
    body = content if isinstance(content, str) else content.body
    return [
        json.loads(found) for found in re.findall(r'<script type="application/json">(.*?)</script>', body, re.DOTALL)
    ]


def cells_of(section: Section | None, table: int = 0) -> list[list[str]]:
    """The rows of one of the section's tables, without its head."""
    assert section is not None
    body = re.findall(r"<tbody>(.*?)</tbody>", section.body, re.DOTALL)[table]
    rows = re.findall(r"<tr>(.*?)</tr>", body, re.DOTALL)
    return [[plain(cell).strip() for cell in re.findall(r"<td[^>]*>(.*?)</td>", row, re.DOTALL)] for row in rows]


class _Checker(HTMLParser):
    """Checks that the elements of a page are balanced, and collects ids, links and headings."""

    VOID = ("meta", "link", "img", "br")

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.faults: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.headings: list[int] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.ids += [found["id"] or ""] if "id" in found else []
        self.links += [found[name] or "" for name in ("href", "src") if name in found]
        if tag == "img" and not found.get("alt"):
            self.faults.append("a picture without a description")
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.faults.append(f"</{tag}> ends what did not begin, at {self.getpos()}")


def check_page(text: str) -> list[dict[str, Any]]:
    """Assert that the page is well-formed and loads nothing. Returns its figures."""
    checker = _Checker()
    checker.feed(text)
    checker.close()
    assert checker.faults == []
    assert checker.open == []
    assert len(set(checker.ids)) == len(checker.ids)
    assert checker.links, "there is a navigation"
    for link in checker.links:
        assert link.startswith(("#", "data:")), f"the page asks for {link}"
        assert not link.startswith("#") or link[1:] in checker.ids
    assert "@import" not in text
    assert not re.search(r"url\(\s*['\"]?http", text.partition("<script>")[0])
    assert text.startswith('<!DOCTYPE html>\n<html lang="en">')
    assert '<meta name="viewport"' in text
    assert checker.headings[0] == 1
    assert all(b <= a + 1 for a, b in zip(checker.headings, checker.headings[1:], strict=False))
    assert "Infinity" not in re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)
    return figures_of(text)
