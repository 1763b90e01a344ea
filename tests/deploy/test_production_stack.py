# SPDX-License-Identifier: Apache-2.0
"""The values for the vLLM production stack's chart.

The chart is not part of this repository. With a checkout of it, the values are checked against
its schema and rendered: ``PRODUCTION_STACK=.../production-stack``, and
``pip install helm-python-sdk``.
"""

import json
import os
import re
import shutil
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.deploy.conftest import DEPLOY, engine, production_stack
from tests.deploy.test_names_exist import ask_vllm

CHART = Path(os.environ.get("PRODUCTION_STACK", "")) / "helm"
needs_chart = pytest.mark.skipif(
    "PRODUCTION_STACK" not in os.environ, reason="PRODUCTION_STACK names no checkout"
)


def test_caches_are_enabled_and_the_image_is_that_of_the_manifests() -> None:
    config = engine()["vllmConfig"]
    # By default the chart disables the prefix cache; without tensorParallelSize, no /dev/shm.
    assert config["enablePrefixCaching"] is True
    assert config["tensorParallelSize"] == int(engine()["requestGPU"])
    base = yaml.safe_load((DEPLOY / "kubernetes" / "base" / "kustomization.yaml").read_text())
    (image,) = base["images"]
    assert (engine()["repository"], engine()["tag"]) == (image["name"], image["newTag"])


def test_probes_are_those_of_the_manifests() -> None:
    base = yaml.safe_load((DEPLOY / "kubernetes" / "base" / "deployment.yaml").read_text())
    (container,) = base["spec"]["template"]["spec"]["containers"]
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        ours = production_stack()["servingEngineSpec"][name]
        for field in ("periodSeconds", "timeoutSeconds", "failureThreshold"):
            assert ours[field] == container[name][field], (name, field)


def test_the_router_routes_by_session() -> None:
    router = production_stack()["routerSpec"]
    assert (router["routingLogic"], router["sessionKey"]) == ("session", "x-session-id")


@needs_chart
def test_values_match_the_schema_of_the_chart() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    # The schema describes a single trigger; the chart's template and KEDA take a list of them.
    # The schema is not packaged with the chart, so Helm never checks it.
    values = json.loads(json.dumps(production_stack()))
    del values["servingEngineSpec"]["modelSpec"][0]["keda"]["triggers"]
    jsonschema.validate(values, schema)


@needs_chart
def test_the_rendered_chart_is_valid_kubernetes(tmp_path: Path) -> None:
    helm = pytest.importorskip("helm_python")
    folder = shutil.copytree(CHART, tmp_path / "chart")
    # Dependencies (dashboards, adapters) are off by default and not available offline.
    description = yaml.safe_load((folder / "Chart.yaml").read_text())
    version = re.findall(
        r"vllm-stack (\S+):", (DEPLOY / "production-stack" / "values.yaml").read_text()
    )
    assert version == [description["version"]]
    description.pop("dependencies", None)
    (folder / "Chart.yaml").write_text(yaml.safe_dump(description))
    (folder / "Chart.lock").unlink(missing_ok=True)
    with helm.Chart.load(str(folder)) as chart:
        texts = chart.render(production_stack(), name="stack", namespace="default").values()
    documents = [d for text in texts for d in yaml.safe_load_all(text) if d]
    kinds = sorted(document["kind"] for document in documents)
    assert {"ScaledObject", "ServiceMonitor", "PodDisruptionBudget"} <= set(kinds)
    for document in documents:
        if "." not in document["apiVersion"].split("/")[0].removesuffix(".k8s.io"):
            kubernetes_validate.validate(document, "1.34", strict=False)
    (pod,) = (
        d["spec"]["template"]["spec"]
        for d in documents
        if d["kind"] == "Deployment" and "replicas" not in d["spec"]
    )
    (container,) = pod["containers"]
    assert container["command"][:2] == ["vllm", "serve"]
    ask_vllm({"chart": container["command"][2:]})
    assert {m["mountPath"] for m in container["volumeMounts"]} >= {"/data", "/dev/shm", "/tmp"}
    assert pod["serviceAccountName"] == "flashvlm-vllm"
