# SPDX-License-Identifier: Apache-2.0
"""The table."""

from typing import Final

from testing.tiny.table import (
    deepseek,
    ernie,
    gemma,
    idefics,
    keye,
    kimi,
    llama4,
    mimo,
    minicpm,
    molmo,
    nemotron,
    omni,
    ovis,
    patches,
    phi,
    projected,
    qwen3_towers,
    siglip,
    single,
    step,
    step3p7,
)
from testing.tiny.table.entry import TinyModel

_GROUPS: Final = (
    deepseek,
    ernie,
    gemma,
    idefics,
    keye,
    kimi,
    llama4,
    mimo,
    minicpm,
    molmo,
    nemotron,
    omni,
    ovis,
    patches,
    phi,
    projected,
    qwen3_towers,
    siglip,
    single,
    step,
    step3p7,
)

TABLE: Final[dict[str, TinyModel]] = {
    entry.architecture: entry for group in _GROUPS for entry in group.ENTRIES
}
"""Entries by architecture."""
