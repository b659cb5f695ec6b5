"""What a soak watches: memory and file descriptors of processes over time, and whether all counters are at rest."""

import json
import math
import re
import statistics
import time
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import redis

_BLOCKS = 12
# Of Student's t for _BLOCKS - 2 degrees of freedom: 95 % of the cases lie between minus this and this.
_T = 2.228
_ANONYMOUS = re.compile(r"^RssAnon:\s+(\d+) kB$", re.MULTILINE)
_SAMPLE = re.compile(r"^([\w:]+)(?:\{.*\})? (\S+)", re.MULTILINE)
PROMPT, GENERATED = "vllm:prompt_tokens_total", "vllm:generation_tokens_total"
_VLLM = "VLLM::"
_AT_REST = (
    *("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"),
    *("synthia_requests_in_flight", "synthia_requests_queued", "synthia_ledger_waiting_rows"),
)
_STATE_AT_REST = ("queued_requests", "queued_tokens", "in_flight_requests", "in_flight_tokens")


class Look(NamedTuple):
    """One process at one moment. Bytes; what processes share is divided among them in `pss`.

    What is judged is `anonymous`, all that it has allocated: pages of files come and go with what else runs here.
    """

    anonymous: int
    rss: int
    pss: int
    fds: int


@dataclass
class Watch:
    """Processes by name, looked at again and again."""

    pids: Mapping[str, int]
    began: float = field(default_factory=time.monotonic)
    times: list[float] = field(default_factory=list)  # seconds since it began
    looks: dict[str, list[Look]] = field(default_factory=dict)

    def look(self) -> None:
        """Raises psutil.NoSuchProcess where one has gone."""
        found = {name: look_at(pid) for name, pid in self.pids.items()}
        self.times.append(time.monotonic() - self.began)
        for name, look in found.items():
            self.looks.setdefault(name, []).append(look)

    def figures(self) -> dict[str, dict[str, Any]]:
        """By process, after a warm-up of a quarter of the time: slopes an hour, and where they are from."""
        first = next((at for at, one in enumerate(self.times) if one >= self.times[-1] / 4), 0)
        hours = [one / 3600 for one in self.times[first:]]
        return {name: _figures(hours, looks[first:]) for name, looks in self.looks.items()}


def look_at(pid: int) -> Look:
    process = psutil.Process(pid)
    memory = process.memory_full_info()
    found = _ANONYMOUS.search(Path(f"/proc/{pid}/status").read_text())
    return Look(int(found[1]) * 1024 if found else 0, memory.rss, memory.pss, process.num_fds())


def fds_at_rest(pid: int, stores: Sequence[int], looks: int = 10) -> int:
    """File descriptors without the connections to stores (by port), whose pools are bounded and come and go.

    The fewest of some looks: a canary's connection is open for a moment.
    """
    process = psutil.Process(pid)
    found = []
    for _ in range(looks):
        pooled = sum(bool(one.raddr) and one.raddr.port in stores for one in process.net_connections("tcp"))
        found.append(process.num_fds() - pooled)
        time.sleep(0.3)
    return min(found)


def engines(pid: int) -> dict[str, int]:
    """vLLM's own processes under a server, by their names as far as Linux keeps them."""
    return {child.name(): child.pid for child in psutil.Process(pid).children(True) if child.name().startswith(_VLLM)}


def _figures(hours: Sequence[float], looks: Sequence[Look]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, unit in (("anonymous", 1e6), ("rss", 1e6), ("pss", 1e6), ("fds", 1.0)):
        values = [getattr(look, name) / unit for look in looks]
        slope, margin = trend(hours, values)
        found |= {f"{name}, an hour": _rounded(slope), f"{name}, an hour, 95 %": _rounded(margin)}
        found[f"{name}, twelfths"] = [_rounded(mean, 1) for _, mean in _means(hours, values)]
    return found


def trend(hours: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """Least squares' slope an hour, and how far the true one may be from it (95 %); not numbers where too few.

    Through the means of twelfths of the time: neighbouring samples are not independent, and taken one by one they would
    make the interval far too small.
    """
    means = _means(hours, values)
    if len(means) < _BLOCKS:
        return math.nan, math.nan
    at, what = [one for one, _ in means], [other for _, other in means]
    slope, start = statistics.linear_regression(at, what)
    spread = sum((one - statistics.fmean(at)) ** 2 for one in at)
    left = sum((value - start - slope * one) ** 2 for one, value in means)
    return slope, _T * math.sqrt(left / (_BLOCKS - 2) / spread)


def _means(hours: Sequence[float], values: Sequence[float]) -> list[tuple[float, float]]:
    count = len(values)
    edges = [count * number // _BLOCKS for number in range(_BLOCKS + 1)]
    parts = [(hours[start:end], values[start:end]) for start, end in pairwise(edges) if end > start]
    return [(statistics.fmean(when), statistics.fmean(what)) for when, what in parts]


def _rounded(value: float, digits: int = 2) -> float | None:
    return round(value, digits) if math.isfinite(value) else None


@dataclass(frozen=True)
class Server:
    """One that is asked how it is; the key is an admin's."""

    url: str
    key: str

    def sums(self) -> dict[str, float]:
        """Its `/metrics`, each series summed over its labels."""
        found: dict[str, float] = {}
        for name, value in _SAMPLE.findall(self._get("/metrics")):
            found[name] = found.get(name, 0.0) + float(value)
        return found

    def busy(self, *, engine: bool = True) -> dict[str, Any]:
        """What is not at rest. Without `engine`, of the gateway's own counters."""
        sums, state = self.sums(), json.loads(self._get("/admin/state"))
        told = {name: sums.get(name, 0.0) for name in _AT_REST if engine or not name.startswith("vllm:")}
        told |= {name: state[name] for name in _STATE_AT_REST} | {"users": sorted(state["users"])}
        return {name: value for name, value in told.items() if value}

    def _get(self, path: str) -> str:
        asked = urllib.request.Request(self.url + path, headers={"Authorization": f"Bearer {self.key}"})
        with urllib.request.urlopen(asked, timeout=10) as reply:
            body: bytes = reply.read()
            return body.decode()


def leases(url: str) -> int:
    """Requests that count as running in the shared limits."""
    with redis.Redis.from_url(url) as client:
        now = client.time()[0]
        return sum(client.zcount(key, now, "+inf") for key in client.scan_iter("*:open"))


def until_at_rest(engine: Server, gateway: Server, limits: str, seconds: float) -> dict[str, Any]:
    """What is still counted after so many seconds; empty as soon as nothing is.

    A canary, which the gateway sends to an engine that rests, is no unrest: what is at rest once is at rest.
    """
    deadline = time.monotonic() + seconds
    left: dict[str, Any] = {"gateway": "", "engine": "", "limits": ""}
    while left and time.monotonic() < deadline:
        with suppress(OSError):
            now = {"gateway": gateway.busy(engine=False), "engine": engine.busy(), "limits": leases(limits)}
            left = {name: now[name] for name in left if now[name]}
        time.sleep(0.3)
    return left
