# SPDX-License-Identifier: Apache-2.0
"""A request's visual fields are accepted exactly as documented."""

import json
import math
import re
from typing import Any

import jsonschema
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, TypeAdapter, ValidationError

from flashvlm_vllm.request.budget import parse_budget, parse_budget_text
from flashvlm_vllm.request.field_error import FieldError
from flashvlm_vllm.request.read_request import read_request
from flashvlm_vllm.request.request_budget import (
    as_json,
    parse_request_budget,
    parse_request_budget_text,
)
from flashvlm_vllm.request.selector_name import parse_selector
from flashvlm_vllm.request.visual_positions import parse_positions
from flashvlm_vllm.serving.request_models import REQUEST_MODELS, VisualBudget

NUMBERS = st.one_of(
    st.integers(),
    st.integers(-3, 3),
    st.floats(),
    st.floats(-1, 2),
    st.sampled_from([0.0, -0.0, 1.0, 64.0, 1 - 2**-53, 5e-324, 10**400]),
)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.text()),
    lambda inner: st.one_of(st.lists(inner), st.dictionaries(st.text(), inner)),
    max_leaves=5,
)
POSITIONS = st.sampled_from(["kept", "closed", "KEPT", " kept", "", None])
TEXTS = st.one_of(
    st.text(),
    NUMBERS.map(str),
    NUMBERS.map(lambda number: f"  {number}\n"),
    st.from_regex(r"[0-9._+eE-]{1,8}", fullmatch=True),
    st.sampled_from(
        [
            "null",
            "None",
            " OFF ",
            "nan",
            "Infinity",
            "1_0",
            "0_1.5",
            "\u0664",
            "\u0660.\u0665",
            "\u00bd",
        ]
    ),
)


BUDGETS = JSON | st.sampled_from(["fit", "Fit"]) | st.fixed_dictionaries({"total": JSON | NUMBERS})
FIELDS: dict[str, Any] = {
    "visual_budget": BUDGETS,
    "visual_query": JSON,
    "visual_selector": JSON,
    "visual_positions": POSITIONS | JSON,
}


def is_budget(value: object) -> bool:
    """The README's table: an integer from 1, a fraction strictly between 0 and 1, or null."""
    if value is None:
        return True
    if type(value) is int:
        return value >= 1
    return type(value) is float and 0 < value < 1


def is_request_budget(value: object) -> bool:
    """A budget of each item, a total, or what fits."""
    if isinstance(value, dict):
        total = value.get("total")
        return set(value) == {"total"} and type(total) is int and total >= 1
    return value == "fit" or is_budget(value)


def is_request_budget_text(text: object) -> bool:
    """The same, written as text."""
    if isinstance(text, str) and text.strip().startswith("{"):
        try:
            value = json.loads(text)
        except ValueError:
            return False
        return isinstance(value, dict) and is_request_budget(value)
    return (isinstance(text, str) and text.strip().lower() == "fit") or is_budget_text(text)


def is_budget_text(text: object) -> bool:
    """A budget written in ASCII digits."""
    if not isinstance(text, str):
        return False
    word = text.strip().lower()
    if word in ("null", "none", "off"):
        return True
    if re.fullmatch(r"[0-9]{1,32}", word):
        return int(word) >= 1
    written = re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?", word)
    return written is not None and 0 < float(word) < 1


def accepts(parse: Any, value: object) -> bool:
    try:
        parse(value)
    except ValueError:
        return False
    return True


@settings(max_examples=400)
@given(JSON)
def test_a_budget_is_accepted_iff_documented_and_returned_unchanged(value: Any) -> None:
    assert accepts(parse_budget, value) == is_budget(value)
    if is_budget(value):
        assert parse_budget(value) == value
        assert type(parse_budget(value)) is type(value)


@settings(max_examples=600)
@given(st.one_of(TEXTS, JSON))
@example("\u0660.\u0665")  # Arabic-Indic digits of 0.5
@example("0." + "0" * 400 + "1")
@example("9" * 33)
def test_a_budget_in_text_is_accepted_iff_documented(text: Any) -> None:
    assert accepts(parse_budget_text, text) == is_budget_text(text)


@settings(max_examples=400)
@given(BUDGETS)
def test_a_requests_budget_is_accepted_iff_documented_and_returned_unchanged(value: Any) -> None:
    assert accepts(parse_request_budget, value) == is_request_budget(value)
    if is_request_budget(value):
        assert as_json(parse_request_budget(value)) == value


@settings(max_examples=600)
@given(st.one_of(TEXTS, JSON, BUDGETS.map(json.dumps), st.sampled_from([" FIT\n", "{", "{}"])))
@example('{"total":' * 100_000)
def test_a_requests_budget_in_text_is_accepted_iff_documented(text: Any) -> None:
    if isinstance(text, str) and text.startswith('{"total":{"total"'):
        assert not accepts(parse_request_budget_text, text)  # deeper than json.loads can read
        return
    assert accepts(parse_request_budget_text, text) == is_request_budget_text(text)


@given(JSON)
def test_a_selector_is_a_name_or_null(value: Any) -> None:
    is_name = value is None or (isinstance(value, str) and bool(value.strip()))
    assert accepts(parse_selector, value) == is_name


def is_positions(value: object) -> bool:
    return value is None or (isinstance(value, str) and value in ("kept", "closed"))


@given(POSITIONS | JSON)
def test_positions_are_kept_closed_or_null(value: Any) -> None:
    assert accepts(parse_positions, value) == is_positions(value)
    if not is_positions(value):
        with pytest.raises(ValueError, match="'kept' or 'closed'"):
            parse_positions(value)


@settings(max_examples=400)
@given(NUMBERS | st.none() | st.booleans() | st.text() | BUDGETS)
def test_openapi_and_the_request_model_accept_the_same_budgets(value: Any) -> None:
    schema = TypeAdapter(VisualBudget).json_schema()
    is_valid = jsonschema.Draft202012Validator(schema).is_valid(value)
    number = value["total"] if isinstance(value, dict) and set(value) == {"total"} else value
    if is_request_budget(value):
        assert is_valid
    elif not (isinstance(number, float) and (number.is_integer() or math.isnan(number))):
        # In JSON Schema 64.0 is an integer, and JSON has no NaN.
        assert not is_valid


@pytest.mark.parametrize("path", REQUEST_MODELS)
@settings(max_examples=150, deadline=None)
@given(fields=st.fixed_dictionaries({}, optional=FIELDS))
def test_request_models_accept_exactly_the_documented_fields(
    path: str, fields: dict[str, Any]
) -> None:
    message = {"role": "user", "content": "hello"}
    of_messages = {"model": "m", "max_tokens": 1, "messages": [message]}
    needed: dict[str, Any] = {
        "/v1/messages": of_messages,
        "/v1/messages/count_tokens": of_messages,
        "/v1/messages/render": of_messages,
        "/v1/chat/completions": {"messages": [message]},
        "/v1/chat/completions/batch": {"messages": [[message]]},
        "/v1/responses": {"input": "hello"},
    }[path]
    is_documented = is_request_budget(fields.get("visual_budget")) and all(
        isinstance(fields.get(name), str | None) for name in ("visual_query", "visual_selector")
    )
    is_documented = is_documented and is_positions(fields.get("visual_positions"))
    try:
        request = REQUEST_MODELS[path].model_validate({**needed, **fields})
    except ValidationError as error:
        assert not is_documented
        # The error names the invalid field.
        assert {each["loc"][0] for each in error.errors()} <= set(fields)
        return
    assert is_documented
    for name, value in fields.items():
        given = getattr(request, name)
        assert (as_json(given) if name == "visual_budget" else given) == value


@settings(max_examples=400)
@given(
    fields=st.fixed_dictionaries({}, optional=FIELDS),
    metadata=st.one_of(
        JSON,
        st.fixed_dictionaries(
            {},
            optional={
                "visual_budget": TEXTS | JSON | BUDGETS.map(json.dumps),
                "visual_query": TEXTS | JSON,
                "visual_selector": TEXTS | JSON,
                "visual_positions": POSITIONS | JSON,
                "other": JSON,
            },
        ),
    ),
)
def test_fields_override_metadata_and_invalid_values_raise_a_field_error(
    fields: dict[str, Any], metadata: Any
) -> None:
    # Not validated, as on vLLM's own routes, whose models do not know these fields.
    request = Stock.model_construct(_fields_set={*fields, "metadata"}, metadata=metadata, **fields)
    listed = metadata if isinstance(metadata, dict) else {}
    merged = {**listed, **fields}
    budget_is_good = (
        is_request_budget(fields["visual_budget"])
        if "visual_budget" in fields
        else "visual_budget" not in listed or is_request_budget_text(listed["visual_budget"])
    )
    query, selector = merged.get("visual_query"), merged.get("visual_selector")
    selector_is_good = selector is None or (isinstance(selector, str) and bool(selector.strip()))
    is_good = budget_is_good and isinstance(query, str | None) and selector_is_good
    is_good = is_good and is_positions(merged.get("visual_positions"))
    try:
        read = read_request(request)
    except FieldError as error:
        assert not is_good
        assert error.field.removeprefix("metadata.") in merged
        return
    assert is_good
    assert read.query == query
    assert read.positions == merged.get("visual_positions")
    assert read.has_budget == ("visual_budget" in merged)
    if "visual_budget" in fields:
        assert as_json(read.budget) == fields["visual_budget"]


class Stock(BaseModel, extra="allow"):
    """A request of one of vLLM's own models, which does not declare the visual fields."""

    metadata: Any = None


@given(st.integers(1, 10**6), st.floats(0, 1, exclude_min=True, exclude_max=True))
def test_budgets_survive_json_serialisation(tokens: int, fraction: float) -> None:
    for budget in (tokens, fraction):
        carried = parse_budget(json.loads(json.dumps(budget)))
        assert carried == budget and not math.isnan(budget)
