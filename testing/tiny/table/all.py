# SPDX-License-Identifier: Apache-2.0
"""The table."""

from typing import Final

from testing.tiny.table import deepseek, keye, ovis, patches
from testing.tiny.table.entry import TinyModel

_GROUPS: Final = (deepseek, keye, ovis, patches)

TABLE: Final[dict[str, TinyModel]] = {
    entry.architecture: entry for group in _GROUPS for entry in group.ENTRIES
}
"""Entries by architecture."""
