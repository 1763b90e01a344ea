# SPDX-License-Identifier: Apache-2.0
"""A model on which the self-check fails refuses budgets, with the reason, and serves the rest."""

import threading
from typing import Any

import pytest

from flashvlm_vllm.models.general.processor import GeneralProcessor
from flashvlm_vllm.request.read_request import VisualRequest
from flashvlm_vllm.request.refusal import Reason, Refusal
from flashvlm_vllm.settings import ServerSettings


class Checked(GeneralProcessor):
    """A processor whose self-check has a given outcome."""

    _settings = ServerSettings()  # type: ignore[assignment]

    def __init__(self, outcome: Any) -> None:
        self._checking = None
        self._check_lock = threading.Lock()
        self.outcome, self.checks = outcome, 0

    def _error_of_one_prune(self) -> str | None:
        self.checks += 1
        # The check's own request has a budget and is not refused.
        self.own_request(BUDGET, {})  # type: ignore[arg-type]
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome  # type: ignore[no-any-return]

    def _get_mm_fields_config(self, *args: Any) -> Any:
        raise NotImplementedError


BUDGET = VisualRequest(has_budget=True, budget=8)
NONE = VisualRequest(has_budget=True, budget=None)


@pytest.mark.parametrize(
    ("outcome", "message"),
    [
        ("of 64 visual tokens 64 stayed where half were asked for", "of 64 visual tokens 64"),
        (KeyError("pixel_values"), r"failed \(KeyError: 'pixel_values'\)"),
    ],
)
def test_a_budget_is_refused_with_the_reason(outcome: Any, message: str) -> None:
    processor = Checked(outcome)
    for _ in range(2):
        with pytest.raises(Refusal, match=message) as refused:
            processor.own_request(BUDGET, {})  # type: ignore[arg-type]
        assert refused.value.reason is Reason.NOT_COVERED
        assert processor.own_request(NONE, {}) is NONE  # type: ignore[arg-type]
    assert processor.checks == 1


def test_a_check_that_holds_is_made_once() -> None:
    processor = Checked(None)
    for _ in range(2):
        assert processor.own_request(BUDGET, {}) is BUDGET  # type: ignore[arg-type]
    assert processor.checks == 1


def test_without_a_budget_nothing_is_checked() -> None:
    processor = Checked("never asked")
    assert processor.own_request(VisualRequest(), {}) == VisualRequest()  # type: ignore[arg-type]
    assert processor.checks == 0
