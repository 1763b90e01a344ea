# SPDX-License-Identifier: Apache-2.0
"""Links of every Markdown file resolve; blocks have a language, and data in them parses."""

import json
import subprocess
import tomllib
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tests.docs.markdown import DOCS, README, REPOSITORY, Block, anchors, blocks, links, pages

PARSERS = {"json": json.loads, "toml": tomllib.loads}
# Executed, parsed, or only displayed.
LANGUAGES = {"bash", "python", *PARSERS, "yaml", "text", "mermaid", "diff"}


def tracked() -> list[Path]:
    """Return every Markdown file of the repository, including new ones."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:  # an unpacked archive without git
        return pages()
    return [path for line in listed.stdout.splitlines() if (path := REPOSITORY / line).exists()]


@pytest.mark.parametrize("page", tracked(), ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_every_relative_link_resolves(page: Path) -> None:
    broken = []
    for link in links(page):
        parts = urlsplit(link)
        if parts.scheme:
            continue
        target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
        if not target.exists():
            broken.append(f"{link}: there is no {target}")
        elif parts.fragment and target.suffix == ".md" and parts.fragment not in anchors(target):
            broken.append(f"{link}: no such heading; there are {sorted(anchors(target))}")
    assert not broken, "\n".join(broken)


def test_every_page_is_linked_from_the_index_and_the_index_from_the_readme() -> None:
    index = DOCS / "README.md"
    reached = {(index.parent / urlsplit(link).path).resolve() for link in links(index)}
    pages_of_docs = {page for page in pages() if page not in (README, index)}
    assert pages_of_docs <= reached, sorted(map(str, pages_of_docs - reached))
    assert "docs/README.md" in links(README)


@pytest.mark.parametrize(
    "block", [each for page in pages() for each in blocks(page)], ids=lambda block: block.name
)
def test_blocks_name_a_language_and_data_parses(block: Block) -> None:
    # A command in a block without a language, or with another shell's name, would not be tested.
    assert block.language in LANGUAGES, f"one of {sorted(LANGUAGES)}, not {block.language!r}"
    if block.language in PARSERS:
        PARSERS[block.language](block.text)
    elif block.language == "yaml":
        list(pytest.importorskip("yaml").safe_load_all(block.text))
    elif block.language in ("text", "mermaid"):
        assert not block.text.lstrip().startswith("$ "), "what is to be run belongs into ```bash"
