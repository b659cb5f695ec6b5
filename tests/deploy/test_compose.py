"""The Compose file against the Compose specification, and what its services are given."""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from deploy.generate import FOLDER
from synthia_vllm.settings import load_settings
from tests.prometheus_service import promtool

COMPOSE: dict[str, Any] = yaml.safe_load((FOLDER / "compose" / "compose.yaml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
OURS = ("gateway", "engine", "engine-gpu")


def test_it_is_what_the_specification_says() -> None:
    """check-jsonschema ships the specification's schema."""
    schema = files("check_jsonschema") / "builtin_schemas" / "vendor" / "compose-spec.json"
    jsonschema.validate(COMPOSE, json.loads(schema.read_text()))


def test_what_it_names_is_there() -> None:
    for service in SERVICES.values():
        assert set(service.get("secrets", ())) <= set(COMPOSE["secrets"])
        assert set(service["networks"]) <= set(COMPOSE["networks"])
        assert set(service.get("depends_on", ())) <= set(SERVICES)
        for volume in service.get("volumes", ()):
            source = volume.partition(":")[0]
            if source.startswith("."):
                assert (FOLDER / "compose" / source).exists(), source
            elif not source.startswith("$"):
                assert source in COMPOSE["volumes"]


@pytest.mark.parametrize("name", OURS)
def test_our_services_have_no_rights(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["user"] == "10001:10001"


def test_only_the_gateway_and_grafana_are_reached_and_from_this_machine_only() -> None:
    ports = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert set(ports) == {"gateway", "grafana"}
    assert all(port.startswith("127.0.0.1:") for published in ports.values() for port in published)


def test_the_engine_shares_a_network_with_the_gateway_alone() -> None:
    beside = {name for name, service in SERVICES.items() if "engine" in service["networks"]}
    assert beside == set(OURS)
    assert COMPOSE["networks"]["engine"]["internal"] is True


@pytest.mark.parametrize("name", ["engine", "gateway"])
def test_the_settings_are_ours(name: str) -> None:
    settings = load_settings(["--config", str(FOLDER / "compose" / f"{name}.yaml")])
    assert settings.host == "0.0.0.0"


@pytest.mark.parametrize("name", SERVICES)
def test_nothing_fills_the_disk_or_takes_the_engines_memory(name: str) -> None:
    service = SERVICES[name]
    assert set(service["logging"]["options"]) == {"max-size", "max-file"}
    assert ("mem_limit" in service) == (not name.startswith("engine"))
    if name == "prometheus":
        assert any("retention.size" in word for word in service["command"])


def test_streams_may_finish_before_docker_kills() -> None:
    settings = load_settings(["--config", str(FOLDER / "compose" / "gateway.yaml")])
    for name in OURS:
        assert int(SERVICES[name]["stop_grace_period"].rstrip("s")) > settings.drain_timeout


def test_promtool_accepts_the_configuration(tmp_path: Path) -> None:
    config = yaml.safe_load((FOLDER / "compose" / "prometheus.yml").read_text())
    key = tmp_path / "key"
    key.write_text("x")
    config["scrape_configs"][0]["authorization"]["credentials_file"] = str(key)
    config["rule_files"] = [str(FOLDER / "prometheus" / "rules" / "*.yml")]
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    done = promtool("check", "config", str(tmp_path / "prometheus.yml"))
    assert done.returncode == 0, done.stdout + done.stderr
