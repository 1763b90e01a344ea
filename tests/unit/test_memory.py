# SPDX-License-Identifier: Apache-2.0
"""What the worker remembers: choices, within bounds, and failures."""

import pytest
import torch

pytest.importorskip("vllm")

from flashvlm_vllm.failures import SelectionFailures
from flashvlm_vllm.models.memory import SelectionMemory
from flashvlm_vllm.selection import Selection


def chosen(rows: int) -> Selection:
    return Selection(merged=torch.zeros(rows, 128))  # 512 bytes a row, and as much beside it.


def test_the_least_recently_used_choices_go_first() -> None:
    memory = SelectionMemory(limit_bytes=6 * 1024)
    for key in range(6):
        memory.put(key, chosen(1))
    assert memory.get(0) is not None
    memory.put(6, chosen(1))
    assert [key for key in range(7) if memory.get(key) is not None] == [0, 2, 3, 4, 5, 6]
    memory.put(7, chosen(5))
    assert [key for key in range(8) if memory.get(key) is not None] == [4, 5, 6, 7]


def test_a_choice_larger_than_the_bound_is_kept_until_the_next() -> None:
    memory = SelectionMemory(limit_bytes=1024)
    memory.put("a", chosen(1))
    memory.put("b", chosen(100))
    assert memory.get("a") is None
    assert memory.get("b") is not None
    memory.put("c", chosen(1))
    assert memory.get("b") is None
    assert memory.get("c") is not None


def test_putting_twice_counts_once() -> None:
    memory = SelectionMemory(limit_bytes=4 * 1024)
    memory.put("a", chosen(1))
    for _ in range(10):
        memory.put("b", chosen(2))
    assert memory.get("a") is not None


def test_failures_are_found_by_identity() -> None:
    failures = SelectionFailures()
    failures.note("a", "broke")
    assert failures.among(["b"]) == {}
    assert failures.among(["b", "a"]) == {"a": "broke"}
