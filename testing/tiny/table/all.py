# SPDX-License-Identifier: Apache-2.0
"""The table."""

from importlib import import_module
from typing import Final

from testing.tiny.table.entry import TinyModel

_GROUPS: Final = (
    "deepseek",
    "ernie",
    "families",
    "gemma",
    "idefics",
    "keye",
    "kimi",
    "llama4",
    "mimo",
    "minicpm",
    "mistral",
    "molmo",
    "nemotron",
    "omni",
    "ovis",
    "parse",
    "patches",
    "phi",
    "projected",
    "qwen3_towers",
    "relatives_glm",
    "relatives_internvl",
    "relatives_pixtral",
    "relatives_qwen",
    "siglip",
    "single",
    "step",
)
"""Modules of this package with entries."""

TABLE: Final[dict[str, TinyModel]] = {
    entry.architecture: entry
    for group in _GROUPS
    for entry in import_module(f"testing.tiny.table.{group}").ENTRIES
}
"""Entries by architecture."""
