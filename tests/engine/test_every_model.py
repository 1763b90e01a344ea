# SPDX-License-Identifier: Apache-2.0
"""One battery of guarantees on the tiny models of the table, each with stock vLLM beside it."""

from typing import Any

import pytest
import vllm

from flashvlm_vllm.supported_models import MODELS, rows
from flashvlm_vllm.vllm_releases import release_of
from scripts.architectures import RELEASE, run
from testing.tiny.table.all import TABLE
from testing.tiny.table.battery import verdict

QUICK = ("KeyeVL1_5ForConditionalGeneration",)
"""With M-RoPE, images and videos, and text between the runs of a video."""


def case(name: str) -> Any:
    """Return a parameter."""
    return pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow])


BY_STOCK = {
    (0, 31): (
        "CohereCompassForConditionalGeneration",
        "Cosmos3EdgeForConditionalGeneration",
        "H2OVLChatModel",
    ),
    (0, 32): ("H2OVLChatModel",),
    (0, 33): ("Cosmos3EdgeForConditionalGeneration", "MuseGlimmerForConditionalGeneration"),
}
"""Those whose tiny model a release of vLLM does not serve without the plugin."""
TESTED = [name for name, row in rows().items() if row.is_tested and name in TABLE]
NOT_SERVED = BY_STOCK.get(release_of(vllm.__version__) or RELEASE, ())
CASES = [case(name) for name in TESTED if name not in NOT_SERVED]


def test_the_table_has_what_is_said_to_be_tested() -> None:
    assert set(QUICK) <= {case.values[0] for case in CASES}
    assert {name for names in BY_STOCK.values() for name in names} <= set(TESTED)
    general = {name for name, row in rows().items() if row.is_tested and row.adapter == "general"}
    assert general <= set(TABLE)
    assert set(MODELS) <= {name for name, row in rows().items() if row.adapter == "own"}


@pytest.mark.parametrize("architecture", CASES)
def test_the_battery_holds(architecture: str) -> None:
    found = run(architecture)
    assert not isinstance(found, str), found
    holds = verdict(*found)
    assert all(holds.values()), holds


@pytest.mark.slow
@pytest.mark.parametrize("architecture", NOT_SERVED)
def test_vllm_itself_does_not_serve_the_other_tiny_models(architecture: str) -> None:
    found = run(architecture)
    assert isinstance(found, str) and found.startswith("vLLM itself"), found
