# SPDX-License-Identifier: Apache-2.0
"""The PromQL expressions in ``deploy/observability`` and the metrics they use."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import yaml

FOLDER = Path(__file__).parents[2] / "deploy" / "observability"
FROM_PROMETHEUS = {"job", "instance"}
"""Labels that Prometheus adds when it scrapes."""
_VARIABLES = {
    "$__rate_interval": "5m",
    "$__range": "3h",
    "$job": ".*",
    "$instance": ".*",
    "$model": ".*",
}


def dashboard() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((FOLDER / "dashboard.json").read_text())
    return loaded


def rules() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load((FOLDER / "rules.yaml").read_text())["groups"]
    found: list[dict[str, Any]] = group["rules"]
    return found


def expressions() -> Iterator[tuple[str, str]]:
    """Yield every expression with its panel's title or its alert's name."""
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", ()):
            text = target["expr"]
            for variable, value in _VARIABLES.items():
                text = text.replace(variable, value)
            yield panel["title"], text
    for rule in rules():
        yield rule["alert"], rule["expr"]


def series(text: str) -> set[tuple[str, frozenset[str]]]:
    """Parse an expression; return the names in it with the labels that are matched."""
    return {
        (selector.name, frozenset(each.name for each in selector.matchers.matchers))
        for selector in _selectors(promql_parser.parse(text))
    }


def _selectors(node: Any) -> Iterator[Any]:
    if isinstance(node, promql_parser.VectorSelector):
        yield node
    inner = [getattr(node, name, None) for name in ("vector_selector", "expr", "lhs", "rhs")]
    for each in [*inner, getattr(node, "param", None), *getattr(node, "args", ())]:
        if each is not None:
            yield from _selectors(each)
