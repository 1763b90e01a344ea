# SPDX-License-Identifier: Apache-2.0
"""The playground page without a browser: when it is served, its security policy, its content."""

import base64
import hashlib
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from flashvlm_vllm.explain import playground
from flashvlm_vllm.explain.playground import PAGE, PATH, content_security_policy

TEXT = PAGE.read_text(encoding="utf-8")
VOID = {"meta", "link", "input", "img", "br"}
# Their end tags are optional in HTML; the page has one per line.
OPTIONAL_END = {"option"}


def client(**args: bool) -> TestClient:
    app = FastAPI()
    app.state.args = SimpleNamespace(**args)
    playground.attach(app)
    return TestClient(app)


@pytest.mark.parametrize("args", [{}, {"visual_playground": False}])
def test_without_the_flag_the_page_is_not_served(args: dict[str, bool]) -> None:
    assert client(**args).get(PATH).status_code == 404


def test_the_page_has_a_strict_content_security_policy() -> None:
    answer = client(visual_playground=True).get(PATH)
    assert answer.status_code == 200
    assert answer.text == TEXT
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(
        part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; ")
    )
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert policy["connect-src"] == "'self'"
    for directive, tag in (("script-src", "script"), ("style-src", "style")):
        (inline,) = re.findall(f"<{tag}>(.*?)</{tag}>", answer.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
        assert policy[directive] == f"'sha256-{digest}'"
    assert "unsafe" not in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_the_page_is_not_part_of_the_openapi_description() -> None:
    one = client(visual_playground=True)
    assert PATH not in one.get("/openapi.json").json()["paths"]
    assert one.head(PATH).status_code == 200
    assert one.post(PATH).status_code == 405


def test_a_page_with_a_second_script_is_refused() -> None:
    with pytest.raises(ValueError, match="one <script>"):
        content_security_policy(TEXT + "<script>alert(1)</script>")


class Page(HTMLParser):
    """Collects start tags with their attributes, and tags that are not closed or closed twice."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.feed(TEXT)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID | OPTIONAL_END:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(f"</{tag}> in line {self.getpos()[0]}")

    def attributes(self, name: str) -> Iterator[str]:
        return (attrs[name] or "" for _, attrs in self.tags if name in attrs)


def test_the_page_is_well_formed() -> None:
    page = Page()
    assert not page.wrong
    assert not page.open
    ids = list(page.attributes("id"))
    assert len(ids) == len(set(ids))
    for name in ("for", "aria-labelledby", "aria-describedby", "list"):
        assert set(page.attributes(name)) <= set(ids)
    # All elements that the script looks up exist.
    assert set(re.findall(r'\$\("([\w-]+)"\)', TEXT)) <= set(ids)


def test_the_page_loads_no_resources_and_calls_relative_addresses_only() -> None:
    page = Page()
    assert all(link.startswith("data:") for link in [*page.attributes("href")])
    assert not [*page.attributes("src"), *page.attributes("action")]
    # The policy would block inline handlers and styles.
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    assert not [*page.attributes("style")]
    assert "@import" not in TEXT
    assert "url(" not in TEXT
    called = set(re.findall(r'call\("([^"]+)"', TEXT))
    assert called == {"v1/models", "v1/visual_tokens", "v1/chat/completions"}


def test_the_api_key_is_not_stored_in_the_browser() -> None:
    for storage in ("localStorage", "sessionStorage", "document.cookie", "indexedDB"):
        assert storage not in TEXT
