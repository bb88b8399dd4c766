"""The Kubernetes manifests as kustomize makes them."""

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
COMPONENTS = ("hpa", "keda", "lws", "networkpolicy", "tls", "weights-oci")
OLDEST_MINOR = 21
"""The first kubectl whose kustomize knows components."""

Manifest = dict[str, Any]


def kubectl() -> str:
    """A kubectl that can build the overlays; without one the test is skipped."""
    found = os.environ.get("KUSTOMIZE") or shutil.which("kubectl")
    if not found:
        pytest.skip(
            "no kubectl here, of which `kubectl kustomize` builds the overlays; KUSTOMIZE names one"
        )
    told = subprocess.run(
        [found, "version", "--client", "-o", "json"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout
    if int(json.loads(told)["clientVersion"]["minor"].rstrip("+")) < OLDEST_MINOR:
        pytest.skip(f"{found} is older than 1.{OLDEST_MINOR}: its kustomize knows no components")
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
    """An operator's own overlay, in the folder: one of ours and these components."""
    up = os.path.relpath(ROOT / "k8s", folder)
    taken = {
        "resources": [f"{up}/overlays/{overlay}"],
        "components": [f"{up}/components/{name}" for name in components],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(taken))
    return build(folder)


def of_kind(manifests: list[Manifest], *kinds: str) -> dict[str, Manifest]:
    """By name."""
    return {
        manifest["metadata"]["name"]: manifest
        for manifest in manifests
        if manifest["kind"] in kinds
    }


def pods(manifests: list[Manifest]) -> dict[str, Manifest]:
    """Each workload's pod template."""
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
    """The variables that a container gets; those that are known only when it runs have a text of
    their kind."""
    maps = {name: found["data"] for name, found in of_kind(manifests, "ConfigMap").items()}
    given = {
        key: value
        for source in container(pod).get("envFrom", [])
        for key, value in maps[source["configMapRef"]["name"]].items()
    }
    return given | {
        entry["name"]: entry.get("value", "pod-0") for entry in container(pod).get("env", [])
    }
