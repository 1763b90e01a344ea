# SPDX-License-Identifier: Apache-2.0
"""The change in each how-to page for contributors works in a copy of the repository."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.markdown import DOCS, REPOSITORY, blocks

PAGES = {
    "add-a-model": (),
    "add-a-selector": ("tests/unit/selection/test_selectors.py",),
    "add-a-metric": ("tests/unit/worker/test_feature_cache.py",),
    "change-the-response": ("tests/unit/serving/test_metrics.py",),
    "support-the-next-vllm": ("tests/unit/scripts/test_repository.py",),
}
"""Pages, and tests that must pass after the change in addition to the one named in the page."""
MOST_FILES = 5


def change_of(page: Path) -> str:
    (diff,) = [block.text for block in blocks(page) if block.language == "diff"]
    return diff.rstrip("\n") + "\n"


def copy_of_the_repository(folder: Path) -> Path:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("an unpacked archive: there is no list of its files")
    for name in listed.stdout.splitlines():
        source = REPOSITORY / name
        if source.is_file() and source.suffix != ".png":
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
    return folder


@pytest.mark.engine
@pytest.mark.parametrize("name", PAGES)
def test_the_change_in_a_page_applies_and_its_tests_pass(name: str, tmp_path: Path) -> None:
    page = DOCS / "contributors" / f"{name}.md"
    copy = copy_of_the_repository(tmp_path / "copy")
    applied = subprocess.run(
        ["git", "apply", "--verbose", "-"],
        input=change_of(page),
        cwd=copy,
        # The copy must not belong to a repository around it.
        env={**os.environ, "GIT_CEILING_DIRECTORIES": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert applied.returncode == 0, f"write the change of {page} again:\n{applied.stderr}"
    (named,) = re.findall(r"runs `(\S+)` there", page.read_text())
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", named, *PAGES[name]],
        cwd=copy,
        env={**os.environ, "PYTHONPATH": str(copy)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-4000:]
    lint = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "."], cwd=copy, capture_output=True, check=False
    )
    assert lint.returncode == 0, lint.stdout.decode()


@pytest.mark.parametrize("name", PAGES)
def test_a_page_states_the_number_of_changed_files_and_lines(name: str) -> None:
    page = DOCS / "contributors" / f"{name}.md"
    change = change_of(page)
    files = re.findall(r"^diff --git a/(\S+)", change, re.MULTILINE)
    lines = [
        line
        for line in change.splitlines()
        if line[:1] in ("+", "-") and not line.startswith(("+++", "---"))
    ]
    assert len(files) <= MOST_FILES
    assert f"{len(files)} files, {len(lines)} lines." in page.read_text()
