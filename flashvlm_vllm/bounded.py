# SPDX-License-Identifier: Apache-2.0
"""Memories that do not grow for ever."""

from typing import TypeVar

Value = TypeVar("Value")


def remember(memory: dict[str, Value], key: str, value: Value, limit: int) -> None:
    """Put an entry into ``memory``; the oldest goes when there are more than ``limit``."""
    memory[key] = value
    if len(memory) > limit:
        memory.pop(next(iter(memory)))
