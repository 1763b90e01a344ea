# SPDX-License-Identifier: Apache-2.0
"""A search on development questions continues on the same code, model and questions only."""

import json
from pathlib import Path

import pytest

from benchmarks.language_attention.run import continued, digest

ABOUT = {"weights": "w", "questions": 300, "code": "new"}
ROWS = {"plain": {"unpruned": {"64": "101"}}}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "results.json"


def write(path: Path, **about: object) -> None:
    path.write_text(json.dumps({"about": {**ABOUT, **about}, "right": ROWS}))


def test_results_of_the_same_code_are_kept(path: Path) -> None:
    write(path)
    assert continued(path, ABOUT) == {"about": ABOUT, "right": ROWS}


def test_results_of_other_code_are_measured_again(path: Path) -> None:
    write(path, code="old")
    assert continued(path, ABOUT) == {"about": ABOUT, "right": {}}
    path.write_text(json.dumps({"about": {"weights": "w", "questions": 300}, "right": ROWS}))
    assert continued(path, ABOUT) == {"about": ABOUT, "right": {}}


def test_results_of_another_model_are_not_replaced(path: Path) -> None:
    write(path, weights="other")
    with pytest.raises(SystemExit, match=r"results\.json is of other weights or questions"):
        continued(path, ABOUT)


def test_the_digest_is_of_contents_in_order(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    path.write_text("a")
    other.write_text("b")
    assert digest([path, other]) != digest([other, path])
    before = digest([path, other])
    other.write_text("c")
    assert digest([path, other]) != before
