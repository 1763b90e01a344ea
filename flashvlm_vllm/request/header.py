# SPDX-License-Identifier: Apache-2.0
"""The budget of an HTTP header, for clients that can set no field of the request."""

from collections.abc import Sequence

from flashvlm_vllm.request.field_error import FieldError, parsed
from flashvlm_vllm.request.request_budget import RequestBudget, parse_request_budget_text

BUDGET_HEADER = "X-Visual-Budget"
"""Name of the header. Its value is a budget in text form, as in ``metadata``."""


def read_header(values: Sequence[str]) -> RequestBudget | None:
    """Return the budget of a request's headers with the name `BUDGET_HEADER`.

    Args:
        values: their values, one or more.

    Returns:
        The budget, or ``None`` when the header turns pruning off.

    Raises:
        FieldError: the value is not a budget, or there is more than one; the message says what is
            allowed.

    """
    if len(values) > 1:
        # Two proxies or a client and a proxy set it. Neither takes precedence.
        message = f"the header is allowed once; got it {len(values)} times"
        raise FieldError(BUDGET_HEADER, f"{BUDGET_HEADER}: {message}")
    return parsed(parse_request_budget_text, values[0], BUDGET_HEADER)
