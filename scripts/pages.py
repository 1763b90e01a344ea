# SPDX-License-Identifier: Apache-2.0
"""Writes a command's output into a page of the documentation."""


def with_part(page: str, name: str, text: str) -> str:
    """Return the page with other text between ``<!-- NAME -->`` and ``<!-- end of NAME -->``.

    Raises:
        ValueError: the page does not have each of the two marks once.

    """
    start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, rest = page.split(start)
    _, after = rest.split(end)
    return f"{before}{start}\n{text}\n{end}{after}"
