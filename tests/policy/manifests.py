"""The Kubernetes manifests as kustomize builds them."""

import functools
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.policy.sources import ROOT

OVERLAYS = ("cpu", "gpu", "ascend")
COMPONENTS = ("hpa", "keda", "lws", "networkpolicy", "prometheus", "tls", "weights-oci")
OLDEST_MINOR = 21
"""The first kubectl whose kustomize knows components."""

Manifest = dict[str, Any]


def kubectl() -> str:
    """Return a kubectl that can build the overlays, or skip the test."""
    found = os.environ.get("KUSTOMIZE") or shutil.which("kubectl")
    if not found:
        pytest.skip(
            "there is no kubectl, which builds the overlays; KUSTOMIZE can name another one"
        )
    told = subprocess.run(
        [found, "version", "--client", "-o", "json"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout
    if int(json.loads(told)["clientVersion"]["minor"].rstrip("+")) < OLDEST_MINOR:
        pytest.skip(f"{found} is older than 1.{OLDEST_MINOR}: its kustomize has no components")
    return found


def build(folder: Path) -> list[Manifest]:
    done = subprocess.run(
        [kubectl(), "kustomize", folder], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


@functools.cache
def build_overlay(name: str) -> list[Manifest]:
    return build(ROOT / "k8s" / "overlays" / name)


def build_with(folder: Path, overlay: str, *components: str) -> list[Manifest]:
    """Build an operator's own overlay, in `folder`: one of ours with these components."""
    up = os.path.relpath(ROOT / "k8s", folder)
    taken = {
        "resources": [f"{up}/overlays/{overlay}"],
        "components": [f"{up}/components/{name}" for name in components],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(taken))
    return build(folder)


def of_kind(manifests: list[Manifest], *kinds: str) -> dict[str, Manifest]:
    """Return the manifests of these kinds by name."""
    return {
        manifest["metadata"]["name"]: manifest
        for manifest in manifests
        if manifest["kind"] in kinds
    }


def pods(manifests: list[Manifest]) -> dict[str, Manifest]:
    """Return the pod template of each workload."""
    templates = {
        name: found["spec"]["template"]
        for name, found in of_kind(manifests, "Deployment", "StatefulSet").items()
    }
    groups = of_kind(manifests, "LeaderWorkerSet")
    return templates | {
        name: found["spec"]["leaderWorkerTemplate"]["workerTemplate"]
        for name, found in groups.items()
    }


def container(pod: Manifest) -> Manifest:
    (only,) = pod["spec"]["containers"]
    return only


def environment(manifests: list[Manifest], pod: Manifest) -> dict[str, str]:
    """Return a container's variables; one that is known only at run time has a sample value."""
    maps = {name: found["data"] for name, found in of_kind(manifests, "ConfigMap").items()}
    given = {
        key: value
        for source in container(pod).get("envFrom", [])
        for key, value in maps[source["configMapRef"]["name"]].items()
    }
    return given | {
        entry["name"]: entry.get("value", "pod-0") for entry in container(pod).get("env", [])
    }
