# SPDX-License-Identifier: Apache-2.0
"""One minute of the soak test: no wrong answer and no lost request."""

import json
import subprocess
import sys

import pytest

from benchmarks.soak.families import FAMILIES
from tests.engine.conftest import REPOSITORY

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("family", FAMILIES)
def test_one_minute_of_the_soak_has_no_wrong_answers_and_no_lost_requests(family: str) -> None:
    # glibc: the library of another allocator is not installed on every machine.
    options = ["--minutes", "1", "--calls", "80", "--allocator", "glibc", "--family", family]
    command = [sys.executable, "-m", "benchmarks.soak.run", *options]
    run = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr[-3000:]
    report = json.loads((REPOSITORY / "benchmarks/output/soak/results.json").read_text())
    soak = report[family]
    assert soak["requests"] > 50
    assert soak["faults"] > 5
    assert soak["under_load"] > 0
    assert (soak["wrong"], soak["lost"]) == (0, 0)
