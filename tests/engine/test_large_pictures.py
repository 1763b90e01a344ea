# SPDX-License-Identifier: Apache-2.0
"""A picture of 16,384 visual tokens with eight other clients, compared with stock vLLM."""

import pytest

from benchmarks.large_pictures.figures import MOST_MEMORY, marks
from benchmarks.large_pictures.run import BUDGET, measure
from benchmarks.measuring.report import missed


@pytest.mark.slow
def test_a_large_picture_delays_other_clients_no_more_than_with_stock() -> None:
    assert (BUDGET, MOST_MEMORY) == (1024, 512)
    rows = measure("two layers", ["flashvlm", "flashvlm-2"], rounds=1)
    assert [row.name for row in rows] == ["stock", "no budget", "flashvlm", "flashvlm-2"]
    assert not missed(marks(rows))
