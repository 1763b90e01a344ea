# SPDX-License-Identifier: Apache-2.0
"""The table."""

from typing import Final

from testing.tiny.table import (
    deepseek,
    keye,
    mimo,
    molmo,
    ovis,
    parse,
    patches,
    projected,
    qwen3_towers,
    single,
)
from testing.tiny.table.entry import TinyModel

_GROUPS: Final = (
    deepseek,
    keye,
    mimo,
    molmo,
    ovis,
    parse,
    patches,
    projected,
    qwen3_towers,
    single,
)

TABLE: Final[dict[str, TinyModel]] = {
    entry.architecture: entry for group in _GROUPS for entry in group.ENTRIES
}
"""Entries by architecture."""
