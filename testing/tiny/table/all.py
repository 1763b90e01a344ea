# SPDX-License-Identifier: Apache-2.0
"""The table."""

from typing import Final

from testing.tiny.table import (
    relatives_glm,
    relatives_internvl,
    relatives_pixtral,
    relatives_qwen,
)
from testing.tiny.table.entry import TinyModel

TABLE: Final[dict[str, TinyModel]] = {
    entry.architecture: entry
    for module in (relatives_qwen, relatives_glm, relatives_internvl, relatives_pixtral)
    for entry in module.ENTRIES
}
"""Entries by architecture."""
