# SPDX-License-Identifier: Apache-2.0
"""Selection time by selector, and the log line for a slow selection."""

import time

import pytest
import torch

from flashvlm_vllm.worker import selection_clock
from flashvlm_vllm.worker.selection_clock import SLOW, SelectionClock, Work

CPU = torch.device("cpu")


def test_time_is_measured_per_selector() -> None:
    clock = SelectionClock()
    assert clock.read() == {}
    for name, items in (("flashvlm", 3), ("uniform", 1), ("flashvlm", 2)):
        with clock.measure(CPU, Work(name, items, 576)):
            time.sleep(0.01)
    read = clock.read()
    assert {name: total.items for name, total in read.items()} == {"flashvlm": 5, "uniform": 1}
    assert read["flashvlm"].seconds > read["uniform"].seconds > 0.009


@pytest.mark.parametrize(("setting", "warns"), [("0.001", True), ("5", False), ("soon", False)])
def test_a_slow_selection_is_logged_with_its_size(
    setting: str, warns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(
        selection_clock.logger, "warning", lambda text, *args: lines.append(text % args)
    )
    monkeypatch.setenv(SLOW, setting)
    with SelectionClock().measure(CPU, Work("divprune", 2, 16_384)):
        time.sleep(0.01)
    assert bool(lines) is warns
    if warns:
        assert "divprune took 0.0 s for 2 item(s) of up to 16384 visual tokens" in lines[0]
