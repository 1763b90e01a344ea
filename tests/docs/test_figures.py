# SPDX-License-Identifier: Apache-2.0
"""Figures in the pages equal those of the committed results."""

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from benchmarks.accuracy.figures import Set
from benchmarks.overview.figures import (
    KINDS,
    LEVELS,
    answers,
    kinds_table,
    percent_of,
    speed_of,
    speed_table,
    speeds,
    summary_table,
    trainings_table,
)
from benchmarks.overview.plot import PICTURE, draw
from benchmarks.overview.run import ACCURACY, LANGUAGE_ATTENTION, PAGE, SETS
from flashvlm_vllm.supported_models import rows
from flashvlm_vllm.vllm_compat.ledger import as_table
from scripts.pages import with_part
from tests.docs.markdown import DOCS, README

NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?(?:[eE]-?\d+)?")


@pytest.fixture(scope="module")
def plain() -> Set:
    return answers()


@pytest.fixture(scope="module")
def served() -> dict:
    return speeds()


def test_the_tables_in_choosing_a_budget_are_of_the_results(plain: Set, served: dict) -> None:
    page = PAGE.read_text()
    assert page == with_part(page, "kinds", kinds_table(plain))
    assert page == with_part(page, "speed", speed_table(served))


def test_the_summary_of_the_accuracy_is_of_the_results(plain: Set) -> None:
    page = ACCURACY.read_text()
    assert page == with_part(page, "summary", summary_table(plain))


@pytest.mark.parametrize("mark", SETS)
def test_the_answers_of_other_trainings_are_of_the_results(mark: str) -> None:
    page = LANGUAGE_ATTENTION.read_text()
    assert page == with_part(page, mark, trainings_table(SETS[mark]))


def test_the_plot_can_be_drawn_and_is_committed(plain: Set, served: dict, tmp_path) -> None:
    draw(plain, served, tmp_path / "drawn.svg")
    drawn, committed = (file.read_text() for file in (tmp_path / "drawn.svg", PICTURE))
    for word in ("flashvlm-2", "8 clients", "visual tokens kept of 576"):
        assert word in drawn and word in committed


def test_the_readme_quotes_the_results(plain: Set, served: dict) -> None:
    readme = README.read_text()
    speeds = ", ".join(f"{speed_of(served, level, 64).median:.2f}" for level in LEVELS)
    assert f"| {speeds} |" in readme
    things, places = KINDS[:-1], KINDS[-1:]
    ours = [
        [f"{percent_of(plain, row, 64, kinds):.0f} %" for row in ("flashvlm", "llm-attention")]
        for kinds in (things, places)
    ]
    assert f"| {ours[0][0]} (`flashvlm`), {ours[0][1]} (`llm-attention`) |" in readme
    assert f"| {ours[1][0]}, {ours[1][1]} |" in readme


def test_the_compatibility_page_lists_the_wraps_of_the_ledger() -> None:
    page = (DOCS / "contributors" / "compatibility.md").read_text()
    assert page == with_part(page, "wraps", as_table()), "run python -m scripts.architecture"


def test_the_readme_counts_the_tested_architectures() -> None:
    counted = sum(row.is_tested and row.adapter != "none" for row in rows().values())
    assert f"[{counted} architectures](docs/users/architectures.md)" in README.read_text()


DENSE = 300
"""Among more numbers than these any figure is found by chance, so only reports of them count."""


@cache
def measured(folder: Path) -> set[float]:
    """Return the numbers of a benchmark's reports, its small results, and its page's tables."""
    texts = [json.dumps(json.loads(file.read_text())) for file in folder.rglob("*.json")]
    texts = [text for text in texts if len(NUMBER.findall(text)) < DENSE]
    texts += [file.read_text() for file in folder.rglob("report.md")]
    page = (folder / "README.md").read_text()
    texts += [
        found[2] for found in re.finditer(r"(?s)<!-- (.+?) -->\n(.*?)<!-- end of \1 -->", page)
    ]
    return {float(each.replace(",", "")) for each in NUMBER.findall("\n".join(texts))}


def statements(page: str) -> Iterator[str]:
    """Yield the paragraphs, list items and table rows of a page."""
    for block in re.split(r"\n\s*\n", page):
        yield from re.split(r"\n(?=[*|] )", block)


def quoted(statement: str) -> set[str]:
    """Return figures with a decimal point, and milliseconds; no code, versions, paper's figures."""
    without = re.sub(r"`[^`]*`|\b(vLLM|Transformers|The\s+paper\s+reports) [\d.]+", "", statement)
    times = re.findall(r"((?:[\d,.]+(?: → | to |\s+and\s+|, ))*[\d,.]+)\s+ms\b", without)
    whole = re.findall(r"(?<![\d.])\d+(?!\d|\.\d)", " ".join(times).replace(",", ""))
    return set(re.findall(r"\d+\.\d+", without)) | set(whole)


@cache
def rounded(folder: Path, places: int) -> set[str]:
    """Return a benchmark's numbers and their percentages with so many decimal places."""
    return {f"{scale * each:.{places}f}" for each in measured(folder) for scale in (1, 100)}


def not_among(figures: set[str], folders: set[str]) -> set[str]:
    """Return the figures that no number of these benchmarks gives when it is rounded."""
    every = [DOCS.parent / "benchmarks" / name for name in folders]
    return {
        figure
        for figure in figures
        if not any(figure in rounded(folder, len(figure.partition(".")[2])) for folder in every)
    }


@pytest.mark.parametrize(
    "page",
    [README, *sorted(DOCS.rglob("*.md"))],
    ids=lambda page: str(page.relative_to(DOCS.parent)),
)
def test_figures_in_a_statement_that_links_to_a_benchmark_are_in_its_results(page: Path) -> None:
    for statement in statements(page.read_text()):
        folders = set(re.findall(r"\((?:\.\./)*benchmarks/(\w+)/", statement))
        if folders:
            wrong = not_among(quoted(statement), folders)
            assert not wrong, (
                f"{sorted(wrong)} not in the results of {sorted(folders)}: {statement}"
            )


def test_a_figure_that_was_not_measured_is_found(tmp_path: Path, monkeypatch: Any) -> None:
    made = tmp_path / "benchmarks" / "made"
    made.mkdir(parents=True)
    (made / "results.json").write_text('{"ratio": [0.2487]}')
    (made / "README.md").write_text("Typed: 9.6\n")
    monkeypatch.setattr("tests.docs.test_figures.DOCS", tmp_path / "docs")
    assert quoted("`x-1.5` has 0.25 (0.2 to 3.1) on vLLM 0.32, 4 of 5") == {"0.25", "0.2", "3.1"}
    assert quoted("2,879 → 450 → 60.5 ms of 48 rows") == {"2879", "450", "60.5"}
    assert list(statements("One\nline.\n\n| a |\n| b |\n\n* c\n  d\n* e")) == [
        *("One\nline.", "| a |", "| b |", "* c\n  d", "* e")
    ]
    many = {f"{number / 1000:.3f}": number / 1000 for number in range(300)}
    (made / "answers.json").write_text(json.dumps(many))
    assert not_among({"0.25", "24.9", "0.2487", "0.26", "9.6"}, {"made"}) == {"0.26", "9.6"}
