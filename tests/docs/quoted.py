# SPDX-License-Identifier: Apache-2.0
"""Finds the figures of a page, and those that no result of a benchmark gives."""

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tests.docs.markdown import REPOSITORY

BENCHMARKS = REPOSITORY / "benchmarks"
NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?(?:[eE]-?\d+)?")
WRITTEN = re.compile(r"(?s)<!-- (.+?) -->\n(.*?)<!-- end of \1 -->")
"""A part of a page that a command writes from results."""
NOT_MEASURED = re.compile(
    r"`[^`]*`|\b(vLLM|Transformers|The\s+paper\s+reports|Until) [\d.]+|\b(LLaVA-|Qwen)[\d.]+"
)
"""Code, versions, the paper's figures and names of models."""
DENSE = 300
"""Among more numbers than these any figure is found by chance, so only reports of them count."""


@cache
def measured(folder: Path) -> set[float]:
    """Return the numbers of a benchmark's reports, its small results, and its page's tables."""
    texts = [json.dumps(json.loads(file.read_text())) for file in folder.rglob("*.json")]
    texts = [text for text in texts if len(NUMBER.findall(text)) < DENSE]
    texts += [file.read_text() for file in folder.rglob("report.md")]
    texts += [found[2] for found in WRITTEN.finditer((folder / "README.md").read_text())]
    return {float(each.replace(",", "")) for each in NUMBER.findall("\n".join(texts))}


def typed(page: str) -> str:
    """Return a page without comments, fenced blocks and the parts that a command writes."""
    return re.sub(r"(?s)<!--.*?-->|```.*?```", "", WRITTEN.sub("", page))


def statements(page: str) -> Iterator[str]:
    """Yield the paragraphs, list items and table rows of a page."""
    for block in re.split(r"\n\s*\n", page):
        yield from re.split(r"\n(?=[*|] )", block)


def quoted(statement: str) -> set[str]:
    """Return figures with a decimal point, and milliseconds; no code, versions, paper's figures."""
    without = NOT_MEASURED.sub("", statement)
    times = re.findall(r"((?:[\d,.]+(?: → | to |\s+and\s+|, ))*[\d,.]+)\s+ms\b", without)
    whole = re.findall(r"(?<![\d.])\d+(?!\d|\.\d)", " ".join(times).replace(",", ""))
    return set(re.findall(r"\d+\.\d+", without)) | set(whole)


@cache
def rounded(folder: Path, places: int) -> set[str]:
    """Return a benchmark's numbers and their percentages with so many decimal places."""
    return {f"{scale * each:.{places}f}" for each in measured(folder) for scale in (1, 100)}


def not_among(figures: set[str], folders: set[str]) -> set[str]:
    """Return the figures that no number of these benchmarks gives when it is rounded."""
    every = [BENCHMARKS / name for name in folders]
    return {
        figure
        for figure in figures
        if not any(figure in rounded(folder, len(figure.partition(".")[2])) for folder in every)
    }
