"""The Kubernetes manifests are valid for today's Kubernetes.

Every service has a workload with probes, and gets only settings that it knows.
"""

import argparse
import copy
import functools
from pathlib import Path
from typing import Any

import kubernetes_validate.utils
import pytest

from common.config import load
from common.settings import KNOWN_NAMES, SERVICES, GatewaySettings
from tests.policy.manifests import (
    COMPONENTS,
    OVERLAYS,
    Manifest,
    build_overlay,
    build_with,
    container,
    environment,
    of_kind,
    pods,
)

UNITS = {"m": 1e-3, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}
# It would read the same megabytes again for every manifest.
kubernetes_validate.utils.schema_contents = functools.cache(
    kubernetes_validate.utils.schema_contents
)

CUSTOM_KINDS = {"ScaledObject", "LeaderWorkerSet", "PodMonitor", "PrometheusRule"}
"""Kinds whose schemas come with what is installed in the cluster, not with Kubernetes."""
NODE_CPUS = 2.0
NODE_BYTES = 8 * 2**30
SYSTEM_CPUS = 0.2
SYSTEM_BYTES = 2**30
"""The resources that a node reserves for itself."""
DRAIN_SECONDS = 10


@pytest.fixture(scope="module", params=OVERLAYS)
def manifests(request: pytest.FixtureRequest) -> list[Manifest]:
    return build_overlay(request.param)


@pytest.fixture(scope="module")
def cpu() -> list[Manifest]:
    return build_overlay("cpu")


def amount(quantity: str | int) -> float:
    text = str(quantity)
    unit = next((unit for unit in UNITS if text.endswith(unit)), "")
    return float(text.removesuffix(unit)) * UNITS.get(unit, 1)


def refused_settings(manifests: list[Manifest], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the workloads whose service would refuse its manifest's variables and arguments."""
    refused = []
    for role, pod in pods(manifests).items():
        with monkeypatch.context() as patched:
            for name, value in environment(manifests, pod).items():
                patched.setenv(name, value)
            argv = [
                argument.replace("$(LWS_WORKER_INDEX)", "1").replace(
                    "$(LWS_LEADER_ADDRESS)", "llm-0.llm.default"
                )
                for argument in container(pod).get("args", [])
            ]
            try:
                load(SERVICES[role], argparse.ArgumentParser(allow_abbrev=False), argv, KNOWN_NAMES)
            except SystemExit:
                refused.append(role)
    return refused


def invalid(manifests: list[Manifest]) -> list[str]:
    """Return what the schemas of the newest Kubernetes that the package knows reject.

    Of custom kinds only the pod templates are checked.
    """
    wrapped = [
        {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": role}, "template": pod}
        for role, pod in pods(manifests).items()
    ]
    problems = []
    for manifest in [*(m for m in manifests if m["kind"] not in CUSTOM_KINDS), *wrapped]:
        try:
            kubernetes_validate.validate(
                manifest, kubernetes_validate.latest_version(), strict=True
            )
        except kubernetes_validate.ValidationError as e:
            problems.append(f"{manifest['kind']} {manifest['metadata']['name']}: {e.message}")
    return problems


def test_every_service_has_its_workload_and_runs_as_it_does_anywhere(
    manifests: list[Manifest],
) -> None:
    assert {role: container(pod)["command"] for role, pod in pods(manifests).items()} == {
        role: ["python", "-m", f"services.{role}"] for role in SERVICES
    }


def test_everything_is_in_the_namespace(manifests: list[Manifest]) -> None:
    assert {m["metadata"].get("namespace") for m in manifests if m["kind"] != "Namespace"} == {
        "twinlens"
    }


def test_every_service_knows_its_settings(
    manifests: list[Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert refused_settings(manifests, monkeypatch) == []


@pytest.mark.parametrize(
    ("name", "value"), [("TWINLENS_CONTROLER", "controller:50050"), ("TWINLENS_THREADS", "many")]
)
def test_a_setting_that_no_service_knows_is_found(
    cpu: list[Manifest], monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    planted = copy.deepcopy(cpu)
    (settings,) = of_kind(planted, "ConfigMap").values()
    settings["data"][name] = value
    assert refused_settings(planted, monkeypatch)


def test_every_pod_is_probed_at_its_health_port(manifests: list[Manifest]) -> None:
    for pod in pods(manifests).values():
        only = container(pod)
        paths = {
            kind: only[f"{kind}Probe"]["httpGet"] for kind in ("startup", "liveness", "readiness")
        }
        assert {kind: get["path"] for kind, get in paths.items()} == {
            "startup": "/healthz",
            "liveness": "/healthz",
            "readiness": "/readyz",
        }
        assert {get["port"] for get in paths.values()} == {"health"}
        ports = {port["name"]: port["containerPort"] for port in only["ports"]}
        assert str(ports["health"]) == environment(manifests, pod)["TWINLENS_HEALTH_PORT"]
        startup = only["startupProbe"]
        assert startup["periodSeconds"] * startup["failureThreshold"] >= 300, (
            "a model may take minutes to load"
        )


def test_a_gateway_stays_reachable_while_the_only_pod_of_a_role_is_replaced(
    manifests: list[Manifest],
) -> None:
    readiness = container(pods(manifests)["gateway"])["readinessProbe"]
    assert readiness["failureThreshold"] * readiness["periodSeconds"] >= 120


def test_a_pod_has_time_to_finish_what_it_holds(manifests: list[Manifest]) -> None:
    for pod in pods(manifests).values():
        longest = float(
            environment(manifests, pod).get(
                "TWINLENS_REQUEST_TIMEOUT", GatewaySettings.request_timeout
            )
        )
        assert pod["spec"]["terminationGracePeriodSeconds"] >= longest + DRAIN_SECONDS


def test_pods_are_restricted(manifests: list[Manifest]) -> None:
    """They meet the "restricted" pod security standard, with a read-only root file system.

    https://kubernetes.io/docs/concepts/security/pod-security-standards/
    """
    for pod in pods(manifests).values():
        spec = pod["spec"]
        own = container(pod)["securityContext"]
        assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] > 0
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert own == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert not spec["enableServiceLinks"] and not spec["automountServiceAccountToken"]


def test_every_pod_says_what_it_needs_and_may_take(manifests: list[Manifest]) -> None:
    for pod in pods(manifests).values():
        resources = container(pod)["resources"]
        for kind in ("cpu", "memory"):
            assert 0 < amount(resources["requests"][kind]) <= amount(resources["limits"][kind])


def test_services_lead_to_pods_and_ports_that_are_there(manifests: list[Manifest]) -> None:
    services = of_kind(manifests, "Service")
    assert {port["name"]: port["port"] for port in services["gateway"]["spec"]["ports"]} == {
        "http": 8000,
        "grpc": 50051,
    }
    for name, service in services.items():
        pod = pods(manifests)[name]
        assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= {
            port["name"] for port in container(pod)["ports"]
        }


def test_a_deployment_keeps_all_pods_during_an_update_unless_each_holds_a_card(
    manifests: list[Manifest],
) -> None:
    for name, deployment in of_kind(manifests, "Deployment").items():
        strategy = deployment["spec"]["strategy"]
        has_card = any(
            "/" in resource
            for resource in container(deployment["spec"]["template"])["resources"]["limits"]
        )
        if name == "controller":
            assert strategy == {"type": "Recreate"}
        else:
            expected = (
                {"maxUnavailable": 1, "maxSurge": 0}
                if has_card
                else {"maxUnavailable": 0, "maxSurge": 1}
            )
            assert strategy["rollingUpdate"] == expected
        assert deployment["spec"].get("replicas", 1) > (1 if has_card else 0)


def test_ranks_can_meet_before_any_is_ready(manifests: list[Manifest]) -> None:
    llm = of_kind(manifests, "StatefulSet")["llm"]["spec"]
    service = of_kind(manifests, "Service")[llm["serviceName"]]["spec"]
    assert llm["podManagementPolicy"] == "Parallel"
    assert service["clusterIP"] == "None" and service["publishNotReadyAddresses"]


def test_a_budget_guards_every_role_whose_pods_hold_requests(manifests: list[Manifest]) -> None:
    budgets = of_kind(manifests, "PodDisruptionBudget")
    assert budgets.keys() == SERVICES.keys() - {"controller"}
    for role, budget in budgets.items():
        assert (
            budget["spec"]["selector"]["matchLabels"].items()
            <= pods(manifests)[role]["metadata"]["labels"].items()
        )


@pytest.mark.parametrize(
    ("overlay", "resource"), [("gpu", "nvidia.com/gpu"), ("ascend", "huawei.com/Ascend910")]
)
def test_a_rank_has_a_card_and_a_vision_replica_one(overlay: str, resource: str) -> None:
    made = build_overlay(overlay)
    limits = {
        role: container(pod)["resources"]["limits"].get(resource, 0)
        for role, pod in pods(made).items()
    }
    tp = int(environment(made, pods(made)["llm"])["TWINLENS_TP"])
    assert limits == {role: {"vision": 1, "llm": tp}.get(role, 0) for role in SERVICES}
    assert tp == 2 and of_kind(made, "Deployment")["vision"]["spec"]["replicas"] == 2


def test_five_vision_pods_and_two_of_every_other_role_fit_on_a_small_node(
    cpu: list[Manifest],
) -> None:
    requests = {role: container(pod)["resources"]["requests"] for role, pod in pods(cpu).items()}

    def total(kind):
        return sum(
            amount(requests[role][kind]) * (5 if role == "vision" else 2) for role in requests
        )

    assert total("cpu") <= NODE_CPUS - SYSTEM_CPUS
    assert total("memory") <= NODE_BYTES - SYSTEM_BYTES


def test_every_overlay_is_valid(manifests: list[Manifest]) -> None:
    assert invalid(manifests) == []


@pytest.mark.parametrize("component", COMPONENTS)
def test_every_component_is_valid_on_top_of_an_overlay(
    component: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = build_with(tmp_path, "gpu", component)
    assert made != build_overlay("gpu"), "it changes something"
    assert invalid(made) == [] and refused_settings(made, monkeypatch) == []


def plant(manifests: list[Manifest], kind: str, path: str, value: Any) -> list[Manifest]:
    planted = copy.deepcopy(manifests)
    place: Any = next(iter(of_kind(planted, kind).values()))
    *way, last = path.split("/")
    for step in way:
        place = place[int(step) if step.isdigit() else step]
    place[last] = value
    return planted


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("Deployment", "spec/replcas", 2),
        ("Deployment", "spec/template/spec/containers/0/readinesProbe", {}),
        ("Deployment", "spec/template/spec/terminationGracePeriodSeconds", "630s"),
        ("StatefulSet", "spec/podManagmentPolicy", "Parallel"),
        ("Service", "spec/publishNotReadyAdresses", True),
        ("PodDisruptionBudget", "spec/maxUnavailble", 1),
    ],
)
def test_a_typo_is_found(cpu: list[Manifest], kind: str, path: str, value: Any) -> None:
    assert len(invalid(plant(cpu, kind, path, value))) >= 1


def test_a_typo_in_the_pods_of_a_leader_worker_set_is_found(tmp_path: Path) -> None:
    made = build_with(tmp_path, "gpu", "lws")
    assert "llm" not in of_kind(made, "StatefulSet"), "it stands in the StatefulSet's place"
    path = "spec/leaderWorkerTemplate/workerTemplate/spec/containers/0/imagePulPolicy"
    assert invalid(made) == [] and len(invalid(plant(made, "LeaderWorkerSet", path, "Always"))) == 1


def test_a_leader_worker_set_has_a_pod_for_each_rank(tmp_path: Path) -> None:
    made = build_with(tmp_path, "gpu", "lws")
    group = of_kind(made, "LeaderWorkerSet")["llm"]["spec"]["leaderWorkerTemplate"]
    assert str(group["size"]) == environment(made, group["workerTemplate"])["TWINLENS_TP"]


def test_a_prometheus_operator_scrapes_every_pod(tmp_path: Path) -> None:
    made = build_with(tmp_path, "gpu", "prometheus")
    monitor = of_kind(made, "PodMonitor")["twinlens"]["spec"]
    [endpoint] = monitor["podMetricsEndpoints"]
    for pod in pods(made).values():
        assert monitor["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
        assert endpoint["port"] in [port["name"] for port in container(pod)["ports"]]


@pytest.mark.parametrize("component", ["hpa", "keda"])
def test_no_manifest_sets_the_replicas_of_vision_if_an_autoscaler_does(
    component: str, tmp_path: Path
) -> None:
    vision = of_kind(build_with(tmp_path, "gpu", component), "Deployment")["vision"]
    assert "replicas" not in vision["spec"]


@pytest.mark.parametrize(
    ("overlay", "components"),
    [("gpu", []), ("gpu", ["weights-oci"]), ("cpu", ["weights-oci"]), ("cpu", ["weights-pvc"])],
)
def test_weights_are_mounted_at_the_model_directory(
    overlay: str, components: list[str], tmp_path: Path
) -> None:
    made = build_with(tmp_path, overlay, *components)
    for role, pod in pods(made).items():
        mounts = {
            mount["mountPath"]: mount.get("readOnly", False)
            for mount in container(pod)["volumeMounts"]
        }
        reads_it = "model" in SERVICES[role].__dataclass_fields__
        assert mounts.get(environment(made, pod)["TWINLENS_MODEL"], False) == reads_it
        assert all(len(volume) == 2 for volume in pod["spec"]["volumes"]), "a name and one source"
