"""`synthia-vllm top`: the live view in a terminal."""

import time
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from synthia_vllm.errors import SynthiaError

_BARS = " ▁▂▃▄▅▆▇█"
_CHART = 60  # points: five minutes
_LATEST = 12  # points: what is older than a minute is not now
_USERS = 15
_NO_REPLICA = "no replica is up"
_STATES = {"up": "green", "unproven": "yellow", "draining": "yellow", "out": "bold red"}


class TopError(SynthiaError):
    """The server does not tell."""


@click.command("top")
@click.option("--url", default="http://127.0.0.1:8000", show_default=True, help="The server.")
@click.option("--key", envvar="SYNTHIA_ADMIN_KEY", help="Admin key (also SYNTHIA_ADMIN_KEY).")
@click.option("--interval", default=2.0, show_default=True, type=click.FloatRange(0.5), help="Seconds between looks.")
@click.option("--once", is_flag=True, help="Print once and end, for scripts and pipes.")
def command(url: str, key: str | None, interval: float, once: bool) -> None:
    """Watch a running server: replicas, users, tokens a second, latencies. Ctrl-C ends it."""
    import httpx

    headers = {"Authorization": f"Bearer {key}"} if key else {}
    console = Console()
    with httpx.Client(base_url=url.rstrip("/"), headers=headers, timeout=10, trust_env=False) as client:
        first = show(ask(client))
        if once or not console.is_terminal:
            console.print(first)
            return
        with Live(first, console=console, screen=True, auto_refresh=False) as live:
            while True:
                time.sleep(interval)
                try:
                    shown = show(ask(client))
                except TopError as error:
                    shown = Group(Text(str(error), style="bold red"), first)
                else:
                    first = shown
                live.update(shown, refresh=True)


def ask(client: Any) -> dict[str, Any]:
    """The live view. Raises TopError that says what to do."""
    import httpx

    try:
        reply = client.get("/admin/live")
    except httpx.HTTPError as error:
        raise TopError(f"{client.base_url} does not answer: {error}") from None
    if reply.status_code in (401, 403):
        raise TopError("this needs an admin key: `synthia-vllm keys create --admin --user ops`, then --key")
    if reply.status_code != 200:
        raise TopError(f"{client.base_url} has no live view (status {reply.status_code})")
    view: dict[str, Any] = reply.json()
    return view


def show(view: dict[str, Any]) -> Group:
    """The whole picture of one moment."""
    serving = view["now"]["serving"] > 0
    charts = _charts(view["history"], serving)
    return Group(_server(view["server"]), _head(view), charts, _replicas(view["replicas"]), _users(view["users"]))


def _server(server: dict[str, Any]) -> RenderableType:
    model = [server["model"]] if server["model"] else []
    gateways = [f"{server['gateways']} gateways"] if server.get("gateways", 1) > 1 else []
    words = [*model, f"synthia-vllm {server['version']}", f"up for {_span(server['uptime_s'])}", *gateways]
    return Text("   ".join(words))


def _head(view: dict[str, Any]) -> RenderableType:
    now, slo, recent = view["now"], view["slo"], view["recent"]
    tokens = f"{now['generation_per_s']:.1f} tokens/s out, {now['prompt_per_s']:.1f} in"
    parts = [
        f"{datetime.fromtimestamp(view['at']):%H:%M:%S}",
        tokens if now["serving"] else _NO_REPLICA,
        f"{now['running']} {'running' if now['serving'] else 'wait for one'}, {now['queued']} queued",
        f"errors {_part(recent['failed'], recent['requests'])}, refused {_part(recent['refused'], recent['requests'])}",
        f"prefix cache hits {_part(recent['prefix_cache_hits'], recent['prefix_cache_queries'])}",
        f"{_number(recent['preemptions'], 0)} preemptions in {recent['window_s'] / 60:.0f} min",
        f"SLO {_part(slo['met'], slo['met'] + slo['missed'])} of {_percent(slo['objective'])}",
        "burn " + ", ".join(f"{name} {_number(rate, 1)}" for name, rate in slo["burn_rate"].items()),
    ]
    return Text("   ".join(parts), style="bold")


def _charts(history: dict[str, Any], serving: bool) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    rows = (
        ("tokens/s", "generation_per_s", "", 1.0),
        ("queued", "queued", "", 1.0),
        ("TTFT p50", "ttft_p50", "ms", 1000.0),
        ("TTFT p99", "ttft_p99", "ms", 1000.0),
        ("  queue p99", "queue_p99", "ms", 1000.0),
        ("  engine p99", "engine_p99", "ms", 1000.0),
        ("ITL p50", "itl_p50", "ms", 1000.0),
        ("ITL p99", "itl_p99", "ms", 1000.0),
    )
    for title, name, unit, factor in rows:
        values = [None if value is None else value * factor for value in history[name][-_CHART:]]
        last = next((value for value in reversed(values[-_LATEST:]) if value is not None), None)
        if not serving and name != "queued":
            last = None
        table.add_row(title, Text(spark(values), style="cyan"), f"{_number(last, 1)} {unit}")
    return Panel(table, title=f"last {_CHART * history['step_s'] / 60:.0f} minutes", title_align="left")


def _replicas(replicas: list[dict[str, Any]]) -> RenderableType:
    table = _table("Replicas", "replica", "state")
    for title in ("in flight", "running", "waiting", "KV use", "in, /s", "out, /s"):
        table.add_column(title, justify="right", no_wrap=True)
    for replica in replicas:
        state = replica["state"] if replica["fresh"] or replica["state"] != "up" else "stale"
        use = replica["kv_use"]
        table.add_row(
            replica["name"],
            Text(state, style=_STATES.get(state, "bold red")),
            str(replica["in_flight"]),
            _number(replica["running"], 0),
            _number(replica["waiting"], 0),
            "–" if use is None else _percent(use),
            _number(replica["prompt_per_s"], 1),
            _number(replica["generation_per_s"], 1),
        )
    return table


def _users(users: list[dict[str, Any]]) -> RenderableType:
    table = _table("Users", "user")
    for title in ("in", "out", "share", "in flight", "queued", "refused", "SLO met"):
        table.add_column(title, justify="right", no_wrap=True)
    for user in users[:_USERS]:
        judged = user["slo_met"] + user["slo_missed"]
        table.add_row(
            user["user"],
            _short(user["prompt_tokens"]),
            _short(user["generation_tokens"]),
            _percent(user["share"]),
            str(user["in_flight"]),
            str(user["queued"]),
            _short(user["refused"]),
            _part(user["slo_met"], judged),
        )
    if len(users) > _USERS:
        table.caption = f"and {len(users) - _USERS} more"
    return table


def _table(title: str, *columns: str) -> Table:
    """As wide as the terminal, 80 columns too: what is long, a name, goes on in a second line."""
    table = Table(title=f"{title} (tokens)", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), expand=True)
    for column in columns:
        table.add_column(column, overflow="fold", min_width=8)
    return table


def spark(values: Sequence[float | None]) -> str:
    """A line of bars from zero to the greatest value; nothing where there is no value."""
    most = max((value for value in values if value is not None), default=0.0)
    steps = len(_BARS) - 1
    return "".join(" " if not value or not most else _BARS[max(1, round(value / most * steps))] for value in values)


def _percent(value: float) -> str:
    """A share. Only all is 100 % and only none is 0 %: what would be rounded to them is told as less, or more."""
    if 0 < value < 0.00005:
        return "<0.01%"
    if 0.99995 <= value < 1:
        return ">99.99%"
    to_end = min(value, abs(1 - value))
    text = f"{100 * value:.{2 if to_end < 0.001 else 1}f}"
    return f"{text.rstrip('0').rstrip('.')}%"


def _part(part: float | None, of: float | None) -> str:
    return _percent(part / of) if part is not None and of else "–"


def _span(seconds: float) -> str:
    """In its two greatest units."""
    minutes = int(seconds // 60)
    hours, days = minutes // 60, minutes // 1440
    if days:
        return f"{days} d {hours % 24} h"
    return f"{hours} h {minutes % 60} min" if hours else f"{minutes} min" if minutes else f"{seconds:.0f} s"


def _short(value: float) -> str:
    """A count, from a million on in three digits: `1.23M`."""
    for factor, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= factor:
            return f"{value / factor:.3g}{unit}"
    return f"{value:,.0f}"


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"
