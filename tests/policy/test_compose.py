"""compose.yaml is checked without an engine.

Every service is there, probed and confined, and gets only settings that it knows.
"""

import copy
import re
from typing import Any

import pytest
import yaml

from common.config import names_of
from common.settings import KNOWN_NAMES, SERVICES, GatewaySettings
from tests.policy.sources import ROOT

Service = dict[str, Any]
ON_CARDS = {"vision-gpu", "llm-gpu"}
OBSERVERS = {"prometheus", "grafana"}
DRAIN_DELAY_SECONDS = 5


@pytest.fixture
def compose() -> dict[str, Any]:
    """Compose.yaml without Prometheus and Grafana."""
    found = yaml.safe_load((ROOT / "compose.yaml").read_text())
    services = found["services"]
    found["services"] = {name: services[name] for name in services if name not in OBSERVERS}
    return found


@pytest.fixture
def observers() -> dict[str, Service]:
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    return {name: services[name] for name in OBSERVERS}


def role_of(name: str) -> str:
    return name.removesuffix("-gpu")


def unknown_settings(services: dict[str, Service]) -> list[str]:
    """Return the variables and flags that the service would refuse or ignore."""
    found = []
    for name, service in services.items():
        known = names_of(SERVICES[role_of(name)])
        given = [
            variable.removeprefix("TWINLENS_").lower()
            for variable in service["environment"]
            if variable.startswith("TWINLENS_")
        ]
        flags = [
            flag.partition("=")[0].removeprefix("--").replace("-", "_")
            for flag in service["command"][1:]
        ]
        found += [f"{name}: {setting}" for setting in (*given, *flags) if setting not in known]
    return found


def unconfined(services: dict[str, Service]) -> list[str]:
    wanted = {
        "init": True,
        "read_only": True,
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
        "restart": "unless-stopped",
    }
    found = [
        f"{name}: {key}"
        for name, service in services.items()
        for key, value in wanted.items()
        if service.get(key) != value
    ]
    for name, service in services.items():
        limits = service.get("deploy", {}).get("resources", {}).get("limits", {})
        found += [f"{name}: {key}" for key in ("cpus", "memory") if key not in limits]
        found += (
            [f"{name}: logging"]
            if "max-size" not in service.get("logging", {}).get("options", {})
            else []
        )
    return found


def published(services: dict[str, Service]) -> dict[str, list[str]]:
    """Return the host ports of each service that publishes any, by compose.yaml's defaults."""
    return {
        name: [defaults(port) for port in service["ports"]]
        for name, service in services.items()
        if service.get("ports")
    }


def defaults(text: str) -> str:
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


def test_every_service_is_there_and_those_that_compute_also_for_gpus(
    compose: dict[str, Any],
) -> None:
    assert set(compose["services"]) == set(SERVICES) | ON_CARDS
    for name, service in compose["services"].items():
        assert service["command"][0] == f"services.{role_of(name)}"
        assert service["image"] == f"twinlens:{service['build']['target']}"
        assert f" AS {service['build']['target']}\n" in (ROOT / "Dockerfile").read_text()


def test_a_start_without_a_profile_is_on_the_cpu(compose: dict[str, Any]) -> None:
    profiles = {
        name: service["profiles"]
        for name, service in compose["services"].items()
        if "profiles" in service
    }
    assert profiles == {
        "vision": ["cpu"],
        "llm": ["cpu"],
        "vision-gpu": ["gpu"],
        "llm-gpu": ["gpu"],
    }
    assert "COMPOSE_PROFILES=cpu" in (ROOT / ".env").read_text().splitlines()


def test_every_service_is_probed_and_starts_after_the_controller_is_healthy(
    compose: dict[str, Any],
) -> None:
    for name, service in compose["services"].items():
        assert service["healthcheck"]["test"] == ["CMD", "twinlens-probe"]
        if name != "controller":
            assert service["depends_on"]["controller"] == {"condition": "service_healthy"}
    needed = compose["services"]["gateway"]["depends_on"]
    assert [name for name, need in needed.items() if need["condition"] == "service_healthy"] == [
        "controller",
        "preprocess",
        "detokenizer",
    ]


def test_the_gateway_stops_before_those_that_it_needs(compose: dict[str, Any]) -> None:
    """Compose stops in reverse order of dependency. Services of a profile may be absent."""
    needed = compose["services"]["gateway"]["depends_on"]
    assert set(needed) == set(compose["services"]) - {"gateway"}
    assert {name for name, need in needed.items() if not need.get("required", True)} == {
        "vision",
        "llm",
    } | ON_CARDS


def test_every_setting_is_one_that_the_service_knows(compose: dict[str, Any]) -> None:
    assert unknown_settings(compose["services"]) == []
    interpolated = set(re.findall(r"\$\{TWINLENS_(\w+)", (ROOT / "compose.yaml").read_text()))
    assert {name.lower() for name in interpolated} <= KNOWN_NAMES


def test_every_container_is_confined(compose: dict[str, Any]) -> None:
    assert unconfined(compose["services"]) == []


def test_only_the_gateway_publishes_ports_and_on_loopback(compose: dict[str, Any]) -> None:
    assert published(compose["services"]) == {
        "gateway": ["127.0.0.1:8000:8000", "127.0.0.1:50051:50051"]
    }
    assert all("network_mode" not in service for service in compose["services"].values())


def test_observers_are_confined_pinned_and_started_by_their_profile_only(
    observers: dict[str, Service],
) -> None:
    assert unconfined(observers) == []
    for service in observers.values():
        assert service["profiles"] == ["observe"]
        assert re.fullmatch(r"[a-z]+/[a-z]+:v?\d+\.\d+\.\d+", service["image"])
        assert not any(name.startswith("TWINLENS_") for name in service.get("environment", {}))
    assert published(observers) == {"grafana": ["127.0.0.1:3000:3000"]}


def test_observers_read_files_that_are_there_and_write_to_volumes(
    observers: dict[str, Service],
) -> None:
    for name, service in observers.items():
        *files, data = service["volumes"]
        assert data.startswith(f"{name}:/")
        for mount in files:
            assert (ROOT / mount["source"]).exists(), mount["source"]
            assert mount["read_only"] and mount["bind"] == {"create_host_path": False}


def test_nobody_can_change_grafana_which_has_no_password(observers: dict[str, Service]) -> None:
    environment = observers["grafana"]["environment"]
    assert environment["GF_AUTH_ANONYMOUS_ORG_ROLE"] == "Viewer"
    assert environment["GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION"] == "true"
    assert environment["GF_AUTH_DISABLE_LOGIN_FORM"] == "true"


def test_prometheus_scrapes_every_service(compose: dict[str, Any]) -> None:
    config = yaml.safe_load((ROOT / "deploy/grafana/prometheus.yml").read_text())
    [job] = config["scrape_configs"]
    [source] = job["dns_sd_configs"]
    assert set(source["names"]) == set(compose["services"])
    assert f"TWINLENS_HEALTH_PORT={source['port']}" in (ROOT / "Dockerfile").read_text()


def test_the_model_directory_is_only_read_and_must_be_there(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        needs_model = "model" in names_of(SERVICES[role_of(name)])
        targets = [service["environment"]["TWINLENS_MODEL"]] if needs_model else []
        if role_of(name) == "llm":
            targets.append("/adapters")
        mounts = service.get("volumes", [])
        assert [mount["target"] for mount in mounts] == targets, name
        for mount in mounts:
            assert mount["read_only"] and mount["bind"] == {"create_host_path": False}


def test_a_stop_leaves_time_for_the_longest_request(compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        seconds = int(defaults(service["stop_grace_period"]).removesuffix("s"))
        assert seconds >= GatewaySettings().request_timeout + DRAIN_DELAY_SECONDS


@pytest.mark.parametrize("name", [*SERVICES, *sorted(ON_CARDS)])
def test_a_mistake_in_any_entry_is_seen(name: str, compose: dict[str, Any]) -> None:
    planted = copy.deepcopy(compose["services"])
    planted[name]["environment"] = {**planted[name]["environment"], "TWINLENS_LOG_LEVLE": "debug"}
    planted[name]["command"] = [*planted[name]["command"], "--device-name=x"]
    planted[name]["read_only"] = False
    planted[name]["deploy"] = {"resources": {"limits": {"cpus": "1"}}}
    planted[name]["ports"] = ["9000:9000"]
    assert unknown_settings(planted) == [f"{name}: log_levle", f"{name}: device_name"]
    assert unconfined(planted) == [f"{name}: read_only", f"{name}: memory"]
    assert published(planted)[name] == ["9000:9000"]
