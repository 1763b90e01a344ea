# SPDX-License-Identifier: Apache-2.0
"""The table."""

from typing import Final

from testing.tiny.table import (
    ernie,
    gemma,
    idefics,
    kimi,
    llama4,
    minicpm,
    nemotron,
    omni,
    phi,
    siglip,
    step,
)
from testing.tiny.table.entry import TinyModel

TABLE: Final[dict[str, TinyModel]] = {
    entry.architecture: entry
    for family in (idefics, gemma, llama4, omni, kimi, minicpm, phi, siglip, step, ernie, nemotron)
    for entry in family.ENTRIES
}
"""Entries by architecture."""
