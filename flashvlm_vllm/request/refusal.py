# SPDX-License-Identifier: Apache-2.0
"""Why a request is refused: a closed set of reasons, so that refusals can be counted by them."""

from enum import StrEnum

from vllm.exceptions import VLLMValidationError

from flashvlm_vllm.request.budget import BUDGET
from flashvlm_vllm.request.question import QUERY
from flashvlm_vllm.request.read_request import FieldError
from flashvlm_vllm.request.selector_name import SELECTOR
from flashvlm_vllm.request.visual_positions import VISUAL_POSITIONS


class Reason(StrEnum):
    """One word for each way in which a request can ask for what it does not get."""

    BAD_BUDGET = "bad_budget"
    """Not a number of tokens, a fraction or null."""
    BAD_QUERY = "bad_query"
    """The words that guide the selection are not a string, or too many."""
    BAD_SELECTOR = "bad_selector"
    """Not the name of anything."""
    BAD_POSITIONS = "bad_positions"
    """Neither kept nor closed."""
    UNKNOWN_SELECTOR = "unknown_selector"
    NOT_COVERED = "not_covered"
    """A budget for a model that is served as it is, or for a video of one that prunes images."""
    BELOW_FLOOR = "below_floor"
    """Fewer tokens than a video has time steps."""
    EMBEDDINGS = "embeddings"
    """A budget for embeddings, which carry no saliency."""
    NO_TOKENS = "no_tokens"
    """A picture so narrow that nothing of it is left to look at."""
    SELECTOR_FAILED = "selector_failed"
    """A selector of another package raised, or returned what it must not."""
    TOO_LARGE = "too_large"
    """More than a route of this plugin, or a selector, takes."""
    TOO_MANY = "too_many"
    """More requests a minute than a route of this plugin takes."""


class Refusal(VLLMValidationError):
    """A request is answered with 400; ``reason`` says in one word why."""

    def __init__(self, reason: Reason, message: str, *, parameter: str | None = None) -> None:
        super().__init__(message, parameter=parameter)
        self.reason = reason


FIELD_REASONS = {
    BUDGET: Reason.BAD_BUDGET,
    f"metadata.{BUDGET}": Reason.BAD_BUDGET,
    QUERY: Reason.BAD_QUERY,
    SELECTOR: Reason.BAD_SELECTOR,
    VISUAL_POSITIONS: Reason.BAD_POSITIONS,
}
"""By the field that is not valid."""


def refusal_of(error: FieldError) -> Refusal:
    """Return the refusal of a request with an invalid field."""
    return Refusal(FIELD_REASONS[error.field], str(error), parameter=error.field)
