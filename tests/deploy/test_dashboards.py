import json
import re
from typing import Any

import pytest
import yaml

from deploy.grafana.generate import FOLDER, build
from deploy.grafana.panels import DASHBOARDS, Dashboard
from tests.running import ROOT


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda one: one.uid)
def test_the_committed_dashboards_are_the_generated_ones(dashboard: Dashboard) -> None:
    """If not: python -m deploy.grafana.generate."""
    assert (FOLDER / f"{dashboard.uid}.json").read_text() == build(dashboard)


def test_no_other_dashboards_are_there() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*")) == sorted(one.uid for one in DASHBOARDS)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_panels_fill_rows_without_overlap(path: Any) -> None:
    cells = set()
    for panel in json.loads(path.read_text())["panels"]:
        at = panel["gridPos"]
        assert panel["targets"]
        assert panel["datasource"]["uid"] == "${datasource}"
        mine = {(at["x"] + i, at["y"] + j) for i in range(at["w"]) for j in range(at["h"])}
        assert not mine & cells, panel["title"]
        assert max(x for x, _ in mine) < 24
        cells |= mine


def test_series_that_dashboards_and_rules_name_are_ours_or_vllms() -> None:
    """What is measured elsewhere, under a wrong name, would be an empty panel."""
    texts = [path.read_text() for path in FOLDER.glob("*.json")]
    texts += [path.read_text() for path in (ROOT / "deploy" / "prometheus" / "rules").glob("*.yml")]
    recorded = set(re.findall(r"record: (\S+)", "".join(texts)))
    named = set(re.findall(r"\b(?:synthia|replica):[\w:]+", "".join(texts)))
    assert named == recorded


def test_grafana_is_provisioned_from_files() -> None:
    folder = ROOT / "deploy" / "grafana" / "provisioning"
    providers = yaml.safe_load((folder / "dashboards" / "synthia.yml").read_text())["providers"]
    sources = yaml.safe_load((folder / "datasources" / "prometheus.yml").read_text())["datasources"]
    assert providers[0]["type"] == "file"
    assert sources[0]["type"] == "prometheus"
