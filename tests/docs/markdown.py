# SPDX-License-Identifier: Apache-2.0
"""Parses a Markdown file: fenced blocks, anchors of headings, links."""

import re
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt
from markdown_it.token import Token

REPOSITORY = Path(__file__).parents[2]
README = REPOSITORY / "README.md"
DOCS = REPOSITORY / "docs"


class Block(NamedTuple):
    """One fenced block."""

    page: Path
    line: int  # line of the fence, from 1
    language: str
    file: str | None  # ```python title=NAME: the reader saves it under that name
    text: str

    @property
    def name(self) -> str:
        """Return its position as path:line."""
        return f"{self.page.relative_to(REPOSITORY)}:{self.line}"


def pages() -> list[Path]:
    """Return the pages whose commands are executed: the README and everything under docs/."""
    return [README, *sorted(DOCS.rglob("*.md"))]


@cache
def _tokens(page: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(page.read_text())


def blocks(page: Path) -> list[Block]:
    """Return a page's fenced blocks in reading order."""
    found = []
    for token in _tokens(page):
        if token.type == "fence" and token.map is not None:
            language, _, rest = token.info.strip().partition(" ")
            file = re.fullmatch(r"title=(\S+)", rest.strip())
            name = file[1] if file else None
            found.append(Block(page, token.map[0] + 1, language, name, token.content))
    return found


def links(page: Path) -> list[str]:
    """Return every link and picture of a page, as written."""
    found = []
    for token in _tokens(page):
        for part in [token, *(token.children or [])]:
            if part.type.startswith("html"):  # an image tag with a width
                found += re.findall(r'(?:src|href)="([^"]+)"', part.content)
            elif (target := part.attrGet("href") or part.attrGet("src")) is not None:
                found.append(str(target))
    return found


@cache
def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives a page's headings."""
    found: dict[str, int] = {}
    tokens = _tokens(page)
    for opening, inline in pairwise(tokens):
        if opening.type != "heading_open":
            continue
        text = "".join(
            child.content
            for child in inline.children or []
            if child.type in ("text", "code_inline")
        )
        slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        found[slug] = found.get(slug, -1) + 1
    return {
        slug if number == 0 else f"{slug}-{number}"
        for slug, last in found.items()
        for number in range(last + 1)
    }
