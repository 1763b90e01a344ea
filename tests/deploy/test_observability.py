# SPDX-License-Identifier: Apache-2.0
"""The dashboard and the alert rules. tests/engine/test_observability.py has the metrics."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.expressions import FOLDER, dashboard, expressions, rules, series

PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed")
ALERTS = [rule["alert"] for rule in rules()]


def promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [str(PROMTOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(("name", "text"), list(expressions()), ids=lambda value: value[:40])
def test_expressions_parse_and_use_metrics_of_this_server(name: str, text: str) -> None:
    assert "$" not in text
    metrics = {metric for metric, _ in series(text)}
    assert metrics
    assert all(re.match(r"flashvlm_|vllm:|http_requests_total$", metric) for metric in metrics)


def test_the_promql_parser_rejects_invalid_expressions() -> None:
    with pytest.raises(ValueError, match="unclosed left parenthesis"):
        series("sum(rate(flashvlm_refusals_total[5m])")
    assert series('sum by (x) (rate(a{y="z"}[5m])) / b > 0') == {
        ("a", frozenset({"y"})),
        ("b", frozenset()),
    }


def test_panels_have_a_position_a_unit_and_a_description() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert cells
        assert max(x for x, _ in cells) < 24
        assert not cells & taken, panel["title"]
        taken |= cells
        if panel["type"] == "row":
            continue
        assert panel["title"]
        assert panel["description"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["datasource"]["uid"] == "${datasource}"
        names = [target["refId"] for target in panel["targets"]]
        assert names
        assert len(set(names)) == len(names)


def test_the_dashboard_uses_exactly_its_declared_variables() -> None:
    board = dashboard()
    variables = {variable["name"] for variable in board["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", str(board["panels"])))
    assert used - {"__rate_interval", "__range"} == variables


def test_every_alert_has_a_description_and_is_documented() -> None:
    pages = (FOLDER.parents[1] / "docs" / "operators" / "operations.md").read_text()
    for rule in rules():
        assert rule["labels"]["severity"] in {"info", "warning", "critical"}
        assert set(rule["annotations"]) == {"summary", "description"}
        assert rule["alert"] in pages


def test_the_prometheusrule_resource_has_the_same_rules() -> None:
    resource = yaml.safe_load((FOLDER / "prometheus-rule.yaml").read_text())
    assert resource["kind"] == "PrometheusRule"
    assert resource["spec"] == yaml.safe_load((FOLDER / "rules.yaml").read_text())


@needs_promtool
def test_promtool_accepts_the_rules_and_their_unit_tests_pass() -> None:
    for arguments in (("check", "rules", "rules.yaml"), ("test", "rules", "rules.test.yaml")):
        verb, kind, name = arguments
        result = promtool(verb, kind, FOLDER / name)
        assert result.returncode == 0, result.stdout + result.stderr


@needs_promtool
@pytest.mark.parametrize("alert", ALERTS)
@pytest.mark.parametrize("never", [True, False])
def test_the_rule_unit_tests_fail_for_an_alert_that_never_or_always_fires(
    alert: str, never: bool, tmp_path: Path
) -> None:
    document: dict[str, Any] = yaml.safe_load((FOLDER / "rules.yaml").read_text())
    (rule,) = [each for each in document["groups"][0]["rules"] if each["alert"] == alert]
    rule["expr"] = f"{'vector(0)' if never else 'vector(1)'} > 0"
    rule.pop("for", None)
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(document))
    shutil.copy(FOLDER / "rules.test.yaml", tmp_path)
    assert promtool("test", "rules", tmp_path / "rules.test.yaml").returncode == 1


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_the_kustomize_component_adds_rules_and_dashboard(tmp_path: Path) -> None:
    shutil.copytree(FOLDER, tmp_path / "observability")
    overlay = tmp_path / "overlay"
    overlay.mkdir()
    (overlay / "kustomization.yaml").write_text(
        "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\n"
        "namespace: serving\ncomponents: [../observability]\n"
    )
    command = ["kubectl", "kustomize", str(overlay)]
    rendered = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rule, board = sorted(yaml.safe_load_all(rendered), key=lambda each: each["kind"] == "ConfigMap")
    assert rule["kind"] == "PrometheusRule"
    assert board["metadata"]["labels"] == {"grafana_dashboard": "1"}
    assert board["data"]["flashvlm.json"] == (FOLDER / "dashboard.json").read_text()
