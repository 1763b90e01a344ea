# SPDX-License-Identifier: Apache-2.0
"""The overlays render, match the schemas of several Kubernetes versions, and use valid names."""

import importlib.util
import re
import warnings
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest

from tests.deploy.conftest import (
    OVERLAYS,
    ROOT,
    container,
    one,
    pod,
    rendered,
)

# From the oldest that has all used fields (unhealthyPodEvictionPolicy) to the newest with a schema.
VERSIONS = ("1.28", "1.31", "1.34", "1.37")
OF_OPERATORS = {"PodMonitor", "ScaledObject"}
GPU_OVERLAYS = ("gpu", "tensor-parallel", "replicas")


def test_there_is_an_overlay_for_each_deployment_type() -> None:
    assert OVERLAYS == ["cpu", "gpu", "replicas", "tensor-parallel"]


@pytest.mark.parametrize("version", VERSIONS)
def test_every_object_matches_the_schema_of(version: str) -> None:
    seen: list[dict[str, Any]] = []
    for overlay in OVERLAYS:
        for document in rendered(overlay):
            if document["kind"] not in OF_OPERATORS and document not in seen:
                seen.append(document)
                used = kubernetes_validate.validate(document, version, strict=True)
                assert used == version  # not replaced by the nearest version with a schema
    assert {document["kind"] for document in seen} == {
        "Deployment", "PersistentVolumeClaim", "PodDisruptionBudget", "Service", "ServiceAccount",
    }  # fmt: skip


def test_the_schemas_reject_unknown_fields() -> None:
    misspelt = {**one("cpu", "Service"), "speck": {}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(misspelt, VERSIONS[-1], strict=True)


def model_of(document: dict[str, Any]) -> Any:
    """Return the model of one custom resource, generated from the operator's own definitions."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from cloudcoil.models.keda.v1alpha1 import ScaledObject
        from cloudcoil.models.prometheus_operator.v1 import PodMonitor

    return {"PodMonitor": PodMonitor, "ScaledObject": ScaledObject}[document["kind"]]


def unknown_fields(document: dict[str, Any]) -> bool:
    """Return whether the model drops fields of a document: it ignores unknown ones."""
    again = model_of(document).model_validate(document).model_dump(
        mode="json", by_alias=True, exclude_unset=True
    )  # fmt: skip
    return bool(again != document)


def test_custom_resources_match_the_models_of_their_operators() -> None:
    documents = [d for d in rendered("replicas") if d["kind"] in OF_OPERATORS]
    assert len(documents) == 2
    for document in documents:
        assert not unknown_fields(document), document["kind"]
        misspelt = {**document, "spec": {**document["spec"], "interwall": "15s"}}
        assert unknown_fields(misspelt)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_probes_do_not_kill_a_pod_that_is_loading_the_model(overlay: str) -> None:
    running = container(overlay)
    startup, liveness = running["startupProbe"], running["livenessProbe"]
    allowed = startup["periodSeconds"] * startup["failureThreshold"]
    assert allowed >= 7200
    # The timeouts of the engine and of the rollout are at least as long.
    environment = {v["name"]: v.get("value") for v in running["env"]}
    assert int(environment["VLLM_ENGINE_READY_TIMEOUT_S"]) >= allowed
    assert one(overlay, "Deployment")["spec"]["progressDeadlineSeconds"] > allowed
    # Kubernetes starts the other two probes after the startup probe has passed. A busy server must
    # fail longer before it is killed than before it is taken out of the Service.
    ready = running["readinessProbe"]
    limits = [p["periodSeconds"] * p["failureThreshold"] for p in (ready, liveness)]
    assert limits[0] < 60 < limits[1]
    (port,) = running["ports"]
    for probe in (startup, ready, liveness):
        assert probe["httpGet"] == {"path": "/health", "port": port["name"]}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_pass_the_restricted_security_standard(overlay: str) -> None:
    spec, running = pod(overlay), container(overlay)
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] == spec["securityContext"]["fsGroup"] == 10001
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert running["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    allowed = {"emptyDir", "persistentVolumeClaim"}
    assert all(set(volume) - {"name"} <= allowed for volume in spec["volumes"])
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
    # No token, and no environment variables for Services: a Service "vllm" would set VLLM_PORT.
    assert spec["automountServiceAccountToken"] is False
    assert one(overlay, "ServiceAccount")["automountServiceAccountToken"] is False
    assert spec["enableServiceLinks"] is False


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_volumes_are_mounted_where_the_image_writes(overlay: str) -> None:
    mounts = {mount["name"]: mount["mountPath"] for mount in container(overlay)["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod(overlay)["volumes"]}
    assert set(mounts) == set(volumes)
    assert mounts["shm"] == "/dev/shm"
    assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
    claim = volumes["cache"]["persistentVolumeClaim"]["claimName"]
    assert one(overlay, "PersistentVolumeClaim")["metadata"]["name"] == claim
    dockerfile = "Dockerfile.cpu" if overlay == "cpu" else "Dockerfile"
    text = (ROOT / "deploy" / dockerfile).read_text()
    for variable in ("HOME", "HF_HOME", "VLLM_CACHE_ROOT"):
        (folder,) = re.findall(rf"\b(?<!_){variable}=(\S+)", text)
        assert any(Path(folder).is_relative_to(place) for place in mounts.values())


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_secrets_come_from_an_optional_secret_object(overlay: str) -> None:
    secret = {
        v["name"]: v["valueFrom"]["secretKeyRef"]
        for v in container(overlay)["env"]
        if "valueFrom" in v
    }
    assert {name: key["key"] for name, key in secret.items()} == {
        "VLLM_API_KEY": "api-key",
        "HF_TOKEN": "hf-token",
    }
    assert all(key["optional"] is True for key in secret.values())
    assert "Secret" not in {document["kind"] for document in rendered(overlay)}


@pytest.mark.parametrize("overlay", GPU_OVERLAYS)
def test_gpu_requests_equal_gpu_limits(overlay: str) -> None:
    resources = container(overlay)["resources"]
    requested = int(resources["requests"]["nvidia.com/gpu"])
    assert requested == (2 if overlay == "tensor-parallel" else 1)
    assert resources["limits"]["nvidia.com/gpu"] == str(requested)
    assert resources["limits"]["memory"] == resources["requests"]["memory"]


def test_the_cpu_overlay_requests_no_gpu() -> None:
    assert "nvidia" not in str(pod("cpu"))
    assert container("cpu")["image"].endswith("-cpu")


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_label_selectors_match_the_pods(overlay: str) -> None:
    deployment = one(overlay, "Deployment")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    selectors = [
        deployment["spec"]["selector"]["matchLabels"],
        one(overlay, "Service")["spec"]["selector"],
    ]
    if overlay == "replicas":
        for kind in ("PodDisruptionBudget", "PodMonitor"):
            selectors.append(one(overlay, kind)["spec"]["selector"]["matchLabels"])
        for spread in pod(overlay)["topologySpreadConstraints"]:
            selectors.append(spread["labelSelector"]["matchLabels"])
    for selector in selectors:
        assert selector and selector.items() <= labels.items()


def test_replicas_scale_with_waiting_requests() -> None:
    deployment, scaled = one("replicas", "Deployment"), one("replicas", "ScaledObject")["spec"]
    assert scaled["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    assert "replicas" not in deployment["spec"]  # set by KEDA
    assert one("replicas", "PodDisruptionBudget")["spec"]["maxUnavailable"] == 1
    assert scaled["minReplicaCount"] >= 2
    # One volume shared by several nodes; a rollout needs no spare GPU.
    assert one("replicas", "PersistentVolumeClaim")["spec"]["accessModes"] == ["ReadWriteMany"]
    assert deployment["spec"]["strategy"]["rollingUpdate"]["maxSurge"] == 0
    (trigger,) = scaled["triggers"]
    query = trigger["metadata"]["query"]
    assert query.startswith("sum(")  # KEDA needs a single number
    metric, label = re.search(r"(vllm:\w+)\{(\w+)=", query).groups()  # type: ignore[union-attr]
    vllm = importlib.util.find_spec("vllm")  # located without importing, which takes seconds
    assert vllm is not None and vllm.origin is not None
    loggers = Path(vllm.origin).parent / "v1" / "metrics" / "loggers.py"
    assert f'"{metric}"' in loggers.read_text()
    monitor = one("replicas", "PodMonitor")["spec"]
    assert label in {re.sub(r"\W", "_", name) for name in monitor["podTargetLabels"]}
    (endpoint,) = monitor["podMetricsEndpoints"]
    assert endpoint["port"] == container("replicas")["ports"][0]["name"]
