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
    parse,
    patches,
    phi,
    projected,
    qwen3_towers,
    relatives_glm,
    relatives_internvl,
    relatives_pixtral,
    relatives_qwen,
    siglip,
    single,
    step,
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
    parse,
    patches,
    phi,
    projected,
    qwen3_towers,
    relatives_glm,
    relatives_internvl,
    relatives_pixtral,
    relatives_qwen,
    siglip,
    single,
    step,
)

TABLE: Final[dict[str, TinyModel]] = {
    entry.architecture: entry for group in _GROUPS for entry in group.ENTRIES
}
"""Entries by architecture."""
