# SPDX-License-Identifier: Apache-2.0
"""Figures in the pages equal those of the committed results."""

import re

import pytest

from benchmarks.accuracy.figures import Set
from benchmarks.overview.figures import (
    KINDS,
    LEVELS,
    answers,
    kept_of,
    kinds_table,
    speed_of,
    speed_table,
    speeds,
)
from benchmarks.overview.plot import PICTURE, draw
from benchmarks.overview.run import PAGE
from flashvlm_vllm.supported_models import rows
from flashvlm_vllm.vllm_compat.ledger import as_table
from scripts.pages import with_part
from tests.docs.markdown import DOCS, README


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
        [
            f"{100 * kept_of(plain, row, 64, kinds).value:.0f} %"
            for row in ("flashvlm", "llm-attention")
        ]
        for kinds in (things, places)
    ]
    assert f"| {ours[0][0]} (`flashvlm`), {ours[0][1]} (`llm-attention`) |" in readme
    assert f"| {ours[1][0]}, {ours[1][1]} |" in readme


def test_the_compatibility_page_lists_the_wraps_of_the_ledger() -> None:
    page = (DOCS / "contributors" / "compatibility.md").read_text()
    mark = "python -m flashvlm_vllm.vllm_compat.ledger"
    found = re.search(rf"<!-- {mark} -->\n\n(.*?)\n\n<!-- {mark}: end -->", page, re.DOTALL)
    assert found is not None
    assert found[1] == as_table()


def test_the_readme_counts_the_tested_architectures() -> None:
    counted = sum(row.is_tested and row.adapter != "none" for row in rows().values())
    assert f"[{counted} architectures](docs/users/architectures.md)" in README.read_text()
