# SPDX-License-Identifier: Apache-2.0
"""Figures in the pages equal those of the committed results."""

import json
import re
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
from tests.docs.quoted import BENCHMARKS, not_among, quoted, statements, typed


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


MEASURED = sorted(
    page for page in BENCHMARKS.rglob("README.md") if (page.parent / "report.md").exists()
)
"""Pages of benchmarks with results."""


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


ELSEWHERE = {
    # The target and the paper's factor; a ratio of two times; TFLOPs of a tower and of 712 tokens.
    "efficiency": {"4.5", "4.23", "6.6", "1.9", "11.4"},
    # The smallest and largest ratio of a start; a share of TTFT.
    "idle": {"0.925", "0.960", "1.102", "1.121", "0.1"},
    # The cost of reading all tokens, which is not built.
    "language_attention": {"15.3"},
    # Of a version before 0.2.
    "large_pictures": {"1.08"},
    # A difference of two times.
    "multiturn": {"12"},
    # Megabytes of pixels; differences and ratios of two times.
    "profile": {"1.3", "350", "1.4"},
    # Forms of the loop that were tried; ratios of two times; the allocator of an earlier run.
    "selection": {"7.9", "8.1", "0.005", "1.98", "2.18", "810", "1.26"},
    # The ratio of two ratios.
    "serving": {"4.5"},
    # Growth in percent; of earlier code and of the page of another benchmark.
    "soak": {"1.4", "2.8", "3.3", "4.4", "4.6", "2237"},
    # Of earlier code.
    "startup": {"1.014", "1.034", "1.043", "1.052"},
}
"""Figures of a benchmark's page that none of its results has.

A figure must be taken out of here when it is not on the page any more.
"""


@pytest.mark.parametrize("page", MEASURED, ids=lambda page: str(page.relative_to(BENCHMARKS)))
def test_figures_on_a_benchmark_s_page_are_in_its_results(page: Path) -> None:
    folder = page.parent.relative_to(BENCHMARKS)
    wrong = set()
    for statement in statements(typed(page.read_text())):
        linked = set(re.findall(r"\]\((?:\.\./)+(\w+)/", statement))
        folders = {name for name in linked if (BENCHMARKS / name / "README.md").exists()}
        wrong |= not_among(quoted(statement), folders | {folder.parts[0]})
    assert wrong == ELSEWHERE.get(str(folder), set())


def test_a_figure_that_was_not_measured_is_found(tmp_path: Path, monkeypatch: Any) -> None:
    made = tmp_path / "benchmarks" / "made"
    made.mkdir(parents=True)
    (made / "results.json").write_text('{"ratio": [0.2487]}')
    (made / "README.md").write_text("Typed: 9.6\n")
    monkeypatch.setattr("tests.docs.quoted.BENCHMARKS", tmp_path / "benchmarks")
    assert quoted("`x-1.5` has 0.25 (0.2 to 3.1) on vLLM 0.32, 4 of 5") == {"0.25", "0.2", "3.1"}
    assert quoted("2,879 → 450 → 60.5 ms of 48 rows") == {"2879", "450", "60.5"}
    assert list(statements("One\nline.\n\n| a |\n| b |\n\n* c\n  d\n* e")) == [
        *("One\nline.", "| a |", "| b |", "* c\n  d", "* e")
    ]
    many = {f"{number / 1000:.3f}": number / 1000 for number in range(300)}
    (made / "answers.json").write_text(json.dumps(many))
    assert not_among({"0.25", "24.9", "0.2487", "0.26", "9.6"}, {"made"}) == {"0.26", "9.6"}
