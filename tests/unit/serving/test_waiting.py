# SPDX-License-Identifier: Apache-2.0
"""Number of waiting requests."""

from flashvlm_vllm.serving.waiting import Waiting


def test_the_latest_reports_of_all_engines_are_added_and_expire() -> None:
    seconds = 0.0
    waiting = Waiting(lambda: seconds)
    assert waiting.count() == 0
    waiting.report(0, 5)
    waiting.report(1, 2)
    seconds = 6.0
    waiting.report(0, 3)
    assert waiting.count() == 5
    seconds = 12.0
    assert waiting.count() == 3
    seconds = 17.0
    assert waiting.count() == 0
