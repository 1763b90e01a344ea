# SPDX-License-Identifier: Apache-2.0
"""The table."""

from typing import Final

from testing.tiny.table.entry import TinyModel

TABLE: Final[dict[str, TinyModel]] = {}
"""Entries by architecture."""
