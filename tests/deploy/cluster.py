"""The Kubernetes cluster to try the manifests on; K8S_TEST_CONTEXT names its kubectl context."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.policy.manifests import build_overlay

NAMESPACE = "twinlens"
ROLLOUT_SECONDS = 300
FIRST_MINOR_WITH_POLICY_V1 = 21
LOAD = Path(__file__).with_name("load.py")


@dataclass(frozen=True)
class Cluster:
    binary: str
    context: str

    def command(self, *arguments: str) -> list[str]:
        return [self.binary, "--context", self.context, "--namespace", NAMESPACE, *arguments]

    def kubectl(self, *arguments: str, text: str | None = None) -> str:
        done = subprocess.run(
            self.command(*arguments),
            input=text,
            capture_output=True,
            text=True,
            timeout=2 * ROLLOUT_SECONDS,
        )
        assert done.returncode == 0, f"kubectl {' '.join(arguments)}: {done.stderr or done.stdout}"
        return done.stdout

    def get(self, *what: str) -> dict[str, Any]:
        return json.loads(self.kubectl("get", *what, "-o", "json"))

    @property
    def minor_version(self) -> int:
        version = json.loads(self.kubectl("version", "-o", "json"))["serverVersion"]
        return int(version["minor"].rstrip("+"))

    def apply(self, manifests: list[dict[str, Any]]) -> None:
        text = yaml.safe_dump_all(manifests)
        if self.minor_version < FIRST_MINOR_WITH_POLICY_V1:
            # An older cluster drops what it does not know, which is enough for tests.
            text = re.sub(
                r"apiVersion: policy/v1$", "apiVersion: policy/v1beta1", text, flags=re.MULTILINE
            )
            self.kubectl("apply", "--validate=false", "-f", "-", text=text)
        else:
            self.kubectl("apply", "-f", "-", text=text)

    def roll_out(self, *workloads: str) -> None:
        """Wait until the workloads are rolled out."""
        for workload in workloads:
            self.kubectl("rollout", "status", workload, f"--timeout={ROLLOUT_SECONDS}s")

    def restart(self, workload: str) -> None:
        self.kubectl("rollout", "restart", workload)
        self.roll_out(workload)

    def scale(self, workload: str, replicas: int) -> None:
        self.kubectl("scale", workload, f"--replicas={replicas}")
        self.roll_out(workload)

    def pods(self, role: str) -> list[str]:
        """Return the names of the role's pods that are not terminating."""
        found = self.get("pods", "-l", f"app.kubernetes.io/component={role}")["items"]
        return [
            pod["metadata"]["name"] for pod in found if "deletionTimestamp" not in pod["metadata"]
        ]

    def client_command(self, what: str) -> list[str]:
        """Return the command that runs `load.py` in the client's pod, against the gateway."""
        python = ["python", "-c", LOAD.read_text(), "http://gateway:8000", what]
        return self.command("exec", "-i", "client", "--", *python)

    @contextlib.contextmanager
    def load(self, clients: int) -> Iterator[dict[str, int]]:
        """Send requests from inside the cluster, through the Service.

        The yielded dictionary counts the outcomes; it is filled at the end.
        """
        outcomes: dict[str, int] = {}
        process = subprocess.Popen(
            self.client_command(str(clients)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert process.stdout and process.stdout.readline() == "first answers\n"
            yield outcomes
            outcomes |= json.loads(process.communicate(timeout=ROLLOUT_SECONDS)[0])
        finally:
            process.kill()
            process.communicate()

    def ask(self, image: Path) -> str:
        """Return the text that the system reads in an image."""
        done = subprocess.run(
            self.client_command("image"),
            input=image.read_bytes(),
            capture_output=True,
            timeout=ROLLOUT_SECONDS,
        )
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout.decode()


def client_pod(gateway: dict[str, Any]) -> dict[str, Any]:
    """Return a pod that sleeps, as restricted as the gateway's, to execute clients in."""
    spec = gateway["spec"]["template"]["spec"]
    (only,) = spec["containers"]
    container = {
        key: only[key] for key in ("image", "imagePullPolicy", "securityContext", "volumeMounts")
    }
    container |= {"name": "client", "command": ["python", "-c", "import signal; signal.pause()"]}
    keys = ("securityContext", "volumes", "enableServiceLinks", "automountServiceAccountToken")
    sleeper = {key: spec[key] for key in keys} | {
        "containers": [container],
        "terminationGracePeriodSeconds": 0,
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "client", "namespace": NAMESPACE},
        "spec": sleeper,
    }


def find_cluster() -> Cluster:
    context = os.environ.get("K8S_TEST_CONTEXT")
    binary = os.environ.get("KUBECTL") or shutil.which("kubectl")
    if not context or not binary:
        pytest.skip(
            "K8S_TEST_CONTEXT is not set, or there is no kubectl: name the context of a test "
            "cluster that has the images of `make images`"
        )
    cluster = Cluster(binary, context)
    reached = subprocess.run(
        [*cluster.command("get", "namespaces", "-o", "name"), "--request-timeout=10s"],
        capture_output=True,
        text=True,
    )
    if reached.returncode:
        pytest.skip(f"the cluster {context} cannot be reached: {reached.stderr.strip()}")
    if f"namespace/{NAMESPACE}" in reached.stdout.split():
        pytest.skip(
            f"the cluster {context} already has a namespace {NAMESPACE}, which a test must not "
            "delete"
        )
    return cluster


@contextlib.contextmanager
def deployed(overlay: str) -> Iterator[Cluster]:
    """Deploy the overlay with a pod for clients, and delete the namespace afterwards."""
    cluster = find_cluster()
    manifests = build_overlay(overlay)
    workloads = {
        f"{m['kind'].lower()}/{m['metadata']['name']}": m
        for m in manifests
        if m["kind"] in ("Deployment", "StatefulSet")
    }
    try:
        cluster.apply([*manifests, client_pod(workloads["deployment/gateway"])])
        cluster.kubectl(
            "wait", "--for=condition=Ready", "pod/client", f"--timeout={ROLLOUT_SECONDS}s"
        )
        cluster.roll_out(*workloads)
        yield cluster
    finally:
        began = time.monotonic()
        cluster.kubectl("delete", "namespace", NAMESPACE, f"--timeout={ROLLOUT_SECONDS}s")
        print(f"the namespace was gone after {time.monotonic() - began:.0f} s")
