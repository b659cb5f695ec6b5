"""Writes the dashboards' JSON from the list of panels: `python -m deploy.grafana.generate`."""

import json
from pathlib import Path

from grafana_foundation_sdk.builders import bargauge, common, dashboard, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import (
    GraphTresholdsStyleMode,
    LegendDisplayMode,
    LegendPlacement,
    StackingMode,
    VizOrientation,
)
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DashboardLinkType,
    DataSourceRef,
    GridPos,
    Threshold,
    ThresholdsMode,
    VariableRefresh,
)

from deploy.grafana.panels import DASHBOARDS, Dashboard, Panel

FOLDER = Path(__file__).parent / "dashboards"
_SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
_HEIGHTS = {"stat": 4, "timeseries": 8, "bars": 8}
_ROW = 24
_AnyPanel = timeseries.Panel | stat.Panel | bargauge.Panel


def build(wanted: Dashboard) -> str:
    """A dashboard as JSON."""
    found = (
        dashboard.Dashboard(wanted.title)
        .uid(wanted.uid)
        .tags(["synthia"])
        .editable()
        .refresh("10s")
        .time("now-1h", "now")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .with_variable(dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
        .link(
            dashboard.DashboardLink("Synthia")
            .type(DashboardLinkType.DASHBOARDS)
            .tags(["synthia"])
            .include_vars(True)
            .keep_time(True)
        )
    )
    if wanted.variable:
        found = found.with_variable(
            dashboard.QueryVariable(wanted.variable)
            .label(wanted.variable.capitalize())
            .query(f"label_values({wanted.variable_series}, {wanted.variable})")
            .datasource(_SOURCE)
            .multi(True)
            .include_all(True)
            .all_value(".*")
            .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        )
    x = y = 0
    for panel in wanted.panels:
        if x + panel.width > _ROW:
            x = 0
            y += 8
        height = _HEIGHTS[panel.kind]
        found = found.with_panel(_panel(panel).grid_pos(GridPos(h=height, w=panel.width, x=x, y=y)))
        x += panel.width
        if x == _ROW:
            x = 0
            y += height
    return json.dumps(found.build(), cls=JSONEncoder, indent=2, sort_keys=True) + "\n"


def _panel(wanted: Panel) -> _AnyPanel:
    found: _AnyPanel
    if wanted.kind == "stat":
        found = stat.Panel()
    elif wanted.kind == "bars":
        found = bargauge.Panel().orientation(VizOrientation.HORIZONTAL)
    else:
        found = _lines(wanted)
    found = found.title(wanted.title).datasource(_SOURCE).unit(wanted.unit).min(0)
    if wanted.help:
        found = found.description(wanted.help)
    if wanted.red_above is not None or wanted.red_below is not None:
        found = found.thresholds(_thresholds(wanted))
    for number, (expression, legend) in enumerate(wanted.queries):
        query = prometheus.Dataquery().expr(expression).legend_format(legend or "__auto").ref_id(chr(ord("A") + number))
        found = found.with_target(query if wanted.kind == "timeseries" else query.instant())
    return found


def _lines(wanted: Panel) -> timeseries.Panel:
    found = timeseries.Panel().legend(
        common.VizLegendOptions()
        .display_mode(LegendDisplayMode.TABLE)
        .placement(LegendPlacement.BOTTOM)
        .show_legend(True)
        .calcs(["lastNotNull", "max"])
    )
    if wanted.stacked:
        found = found.stacking(common.StackingConfig().mode(StackingMode.NORMAL)).fill_opacity(25)
    if wanted.red_above is not None:
        found = found.thresholds_style(common.GraphThresholdsStyleConfig().mode(GraphTresholdsStyleMode.LINE))
    return found


def _thresholds(wanted: Panel) -> dashboard.ThresholdsConfig:
    if wanted.red_below is not None:
        steps = [Threshold(value=None, color="red"), Threshold(value=wanted.red_below, color="green")]
    else:
        steps = [Threshold(value=None, color="green"), Threshold(value=wanted.red_above, color="red")]
    return dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps)


def main() -> None:
    """Writes them all."""
    for wanted in DASHBOARDS:
        (FOLDER / f"{wanted.uid}.json").write_text(build(wanted))


if __name__ == "__main__":
    main()
