# SPDX-License-Identifier: Apache-2.0
"""Reads what a request asks of the selection, from its fields or its ``metadata``."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flashvlm_vllm.budget import BUDGET, Budget, parse_budget, parse_budget_text
from flashvlm_vllm.query import QUERY
from flashvlm_vllm.selector import SELECTOR, parse_selector
from flashvlm_vllm.visual_positions import VISUAL_POSITIONS, VisualPositions, parse_positions


class SettingsError(ValueError):
    """A request's visual field is not valid; ``field`` names it."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


@dataclass(frozen=True)
class VisualSettings:
    """What one request asks of the selection.

    ``has_budget`` tells an explicit ``null`` (no pruning for this request) from silence (the
    server's default).
    """

    has_budget: bool = False
    budget: Budget | None = None
    query: str | None = None
    selector: str | None = None
    positions: VisualPositions | None = None


def read_settings(request: Any) -> VisualSettings:
    """Read a request's visual fields.

    Args:
        request: a pydantic request model; typed fields and unknown ones count alike, so
            routes whose request model is stock (``run-batch``, ``/tokenize``) work too.

    Raises:
        SettingsError: a field is not valid; the message says what is allowed.

    """
    given = request.model_fields_set
    metadata = getattr(request, "metadata", None)
    metadata = metadata if isinstance(metadata, Mapping) else {}
    has_budget, budget = False, None
    if BUDGET in given:
        has_budget, budget = True, _parse(parse_budget, getattr(request, BUDGET), BUDGET)
    elif BUDGET in metadata:
        field = f"metadata.{BUDGET}"
        has_budget, budget = True, _parse(parse_budget_text, metadata[BUDGET], field)
    query = getattr(request, QUERY, None) if QUERY in given else metadata.get(QUERY)
    if query is not None and not isinstance(query, str):
        raise SettingsError(
            QUERY, f"the words that steer the selection are a string; got {type(query).__name__}"
        )
    selector, positions = (
        getattr(request, field, None) if field in given else metadata.get(field)
        for field in (SELECTOR, VISUAL_POSITIONS)
    )
    return VisualSettings(
        has_budget,
        budget,
        query,
        _parse(parse_selector, selector, SELECTOR),
        _parse(parse_positions, positions, VISUAL_POSITIONS),
    )


def _parse(parse: Any, value: object, field: str) -> Any:
    try:
        return parse(value)
    except ValueError as error:
        raise SettingsError(field, f"{field}: {error}") from None
