# SPDX-License-Identifier: Apache-2.0
"""Reasons for refusing a request: a closed set, used as a metric label."""

from enum import StrEnum

from vllm.exceptions import VLLMValidationError

from flashvlm_vllm.request.budget import BUDGET
from flashvlm_vllm.request.field_error import FieldError
from flashvlm_vllm.request.header import BUDGET_HEADER
from flashvlm_vllm.request.question import QUERY
from flashvlm_vllm.request.selector_name import SELECTOR
from flashvlm_vllm.request.steering import VISUAL_STEERING
from flashvlm_vllm.request.visual_positions import VISUAL_POSITIONS


class Reason(StrEnum):
    """Why a request is refused."""

    BAD_BUDGET = "bad_budget"
    """Not a number of tokens, a fraction or null."""
    BAD_QUERY = "bad_query"
    """The words that guide the selection are not a string, or are too many."""
    BAD_SELECTOR = "bad_selector"
    """The selector's name is empty or not a string."""
    BAD_POSITIONS = "bad_positions"
    """The positions are neither ``kept`` nor ``closed``."""
    BAD_STEERING = "bad_steering"
    """Neither message nor latest."""
    UNKNOWN_SELECTOR = "unknown_selector"
    NOT_COVERED = "not_covered"
    """A budget for a model that is not covered, or for a video of one that prunes images only."""
    BELOW_FLOOR = "below_floor"
    """The budget has fewer tokens than a video has time steps."""
    DOES_NOT_FIT = "does_not_fit"
    """A budget that must fit, for a prompt that is too long with the smallest one."""
    EMBEDDINGS = "embeddings"
    """A budget for precomputed embeddings, which have no saliency."""
    NO_TOKENS = "no_tokens"
    """The image is so narrow that no visual tokens are left of it."""
    SELECTOR_FAILED = "selector_failed"
    """A selector of another package raised, or returned an invalid result."""
    TOO_LARGE = "too_large"
    """The request or an item is larger than the route or the selector accepts."""
    TOO_MANY = "too_many"
    """More requests per minute than a route of this plugin accepts."""
    WRONG_ROUTE = "wrong_route"
    """A visual field or the budget header on a route where it would have no effect."""


class Refusal(VLLMValidationError):
    """An error that vLLM answers with status 400; ``reason`` is the metric label."""

    def __init__(self, reason: Reason, message: str, *, parameter: str | None = None) -> None:
        super().__init__(message, parameter=parameter)
        self.reason = reason


FIELD_REASONS = {
    BUDGET: Reason.BAD_BUDGET,
    f"metadata.{BUDGET}": Reason.BAD_BUDGET,
    BUDGET_HEADER: Reason.BAD_BUDGET,
    QUERY: Reason.BAD_QUERY,
    SELECTOR: Reason.BAD_SELECTOR,
    VISUAL_POSITIONS: Reason.BAD_POSITIONS,
    VISUAL_STEERING: Reason.BAD_STEERING,
}
"""Reasons by the name of the field that is not valid."""


def refusal_of(error: FieldError) -> Refusal:
    """Return the refusal of a request with an invalid field."""
    return Refusal(FIELD_REASONS[error.field], str(error), parameter=error.field)
