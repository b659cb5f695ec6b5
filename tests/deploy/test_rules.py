"""Prometheus' configuration and rules, by promtool; and the runbook behind them."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.prometheus_service import promtool
from tests.running import ROOT

FOLDER = ROOT / "deploy" / "prometheus"
RULES = sorted(FOLDER.glob("rules/*.yml"))
UNIT_TESTS = sorted(FOLDER.glob("tests/*.yml"))


def rules(kind: str) -> list[dict[str, Any]]:
    groups = [group for path in RULES for group in yaml.safe_load(path.read_text())["groups"]]
    return [rule for group in groups for rule in group["rules"] if kind in rule]


ALERTS = [rule["alert"] for rule in rules("alert")]


@pytest.mark.parametrize("name", ["prometheus.yml", "prometheus-cluster.yml"])
def test_promtool_accepts_the_configuration_and_its_rules(name: str) -> None:
    done = promtool("check", "config", str(FOLDER / name))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 rule files found" in done.stdout


def test_promtool_accepts_the_rules() -> None:
    done = promtool("check", "rules", "--lint=all", "--lint-fatal", *map(str, RULES))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", UNIT_TESTS, ids=lambda path: path.name)
def test_the_alerts_fire_when_they_should_and_only_then(path: Path) -> None:
    done = promtool("test", "rules", str(path))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("alert", [name for name in ALERTS if name != "SynthiaWatchdog"])  # which always fires
def test_each_alert_is_tested_both_ways(alert: str) -> None:
    tests = [test for path in UNIT_TESTS for test in yaml.safe_load(path.read_text())["tests"]]
    cases = [case for test in tests for case in test["alert_rule_test"] if case["alertname"] == alert]
    assert {bool(case["exp_alerts"]) for case in cases} == {True, False}


@pytest.mark.parametrize("rule", rules("alert"), ids=ALERTS)
def test_each_alert_has_its_section_in_the_runbook(rule: dict[str, Any]) -> None:
    path, _, anchor = rule["annotations"]["runbook_url"].partition("#")
    sections = re.findall(r"^## (\w+)$", (ROOT / path).read_text(), re.MULTILINE)
    assert anchor == rule["alert"].lower()
    assert rule["alert"] in sections
    assert (rule["labels"]["severity"] == "none") == (rule["alert"] == "SynthiaWatchdog")
    assert rule["labels"]["severity"] in ("page", "ticket", "none")


def test_the_runbook_has_no_section_without_an_alert() -> None:
    sections = re.findall(r"^## (\w+)$", Path(ROOT / "docs" / "runbook.md").read_text(), re.MULTILINE)
    assert sections == ALERTS
