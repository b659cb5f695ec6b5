"""A cluster on this machine as an operator sees it: brought to options, killed in part, and watched."""

import asyncio
import contextlib
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
import click
import httpx
import psutil

from synthia_vllm.bench.ray_cluster import up
from synthia_vllm.cluster import local
from synthia_vllm.cluster.config import ENGINE, GATEWAY
from synthia_vllm.cluster.rest import ReplicaStatus, ServeApi, applications

_BACK_S = 300.0
_SETTLE_S = 12.0  # a new replica takes its full share only after `--replicas.slow-start-s`
_ANSWER_S = 5.0
_STATE = re.compile(r'^synthia_replicas\{state="(\w+)"\} (\d+)', re.MULTILINE)
ENGINE_CORE = "VLLM::EngineCore"


class Cluster:
    """`synthia-vllm cluster up`, and what Serve and the processes tell."""

    def __init__(self, port: int, words: Sequence[str], say: Callable[[str], None]) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.say = say
        self._words = ["--port", str(port), *words]

    async def up(self, *words: str, vllm: Sequence[str] = ()) -> float:
        """Brings it to these options beside its own; returns the seconds that took."""
        began = time.monotonic()
        await asyncio.to_thread(up, [*self._words, *words, *(("--", *vllm) if vllm else ())])
        return time.monotonic() - began

    async def replicas(self, application: str = ENGINE) -> list[ReplicaStatus]:
        """Those that run."""
        ray = local.find()
        if ray is None:
            raise click.ClickException("the cluster has gone")
        details = await asyncio.to_thread(ServeApi(ray.dashboard, ray.token).details)
        return [one for one in applications(details)[application].replicas if one.state == "RUNNING" and one.pid]

    async def gateways(self) -> list[str]:
        """Each gateway's own URL."""
        pids = [replica.pid for replica in await self.replicas(GATEWAY)]
        found = [url for pid in pids if (url := await asyncio.to_thread(_answering, pid)) is not None]
        if len(found) < len(pids):
            raise click.ClickException(f"{len(found)} of {len(pids)} gateways answer themselves")
        return found

    async def whole(self, count: int, without: int | None = None, settle: float = _SETTLE_S) -> float:
        """Returns once so many replicas run, and every gateway has them up; the process `without` is gone."""
        began = time.monotonic()
        while not await self._is_whole(count, without):
            if time.monotonic() - began > _BACK_S:
                raise click.ClickException(f"not at {count} replicas after {_BACK_S:.0f} s")
            await asyncio.sleep(1)
        seconds = time.monotonic() - began
        await asyncio.sleep(settle)
        return seconds

    async def _is_whole(self, count: int, without: int | None) -> bool:
        replicas = await self.replicas()
        if len(replicas) != count or without in [replica.pid for replica in replicas]:
            return False
        async with aiohttp.ClientSession() as session:
            samples = [await look(session, url) for url in await self.gateways()]
        return all(sample.states == {"up": count} for sample in samples)


class Starts:
    """Notes how long each replica took that came to run meanwhile. `async with` looks."""

    def __init__(self, cluster: Cluster) -> None:
        self.seconds: list[float] = []
        self._cluster = cluster

    async def __aenter__(self) -> "Starts":
        self._known = {replica.name for replica in await self._cluster.replicas()}
        self._task = asyncio.create_task(self._look())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _look(self) -> None:
        while True:
            for replica in await self._cluster.replicas():
                if replica.name not in self._known:
                    self._known.add(replica.name)
                    self.seconds.append(round(time.time() - replica.since, 1))
            await asyncio.sleep(1)


@dataclass(frozen=True)
class Sample:
    """What one gateway said. `ready`: a status, or 0 where it did not answer in time."""

    at: float
    ready: int
    states: dict[str, int]  # replicas by state, those that are none left out


async def look(session: aiohttp.ClientSession, url: str) -> Sample:
    at, ready, page = time.monotonic(), 0, ""
    timeout = aiohttp.ClientTimeout(_ANSWER_S)
    with contextlib.suppress(aiohttp.ClientError, TimeoutError):
        async with session.get(f"{url}/ready", timeout=timeout) as reply:
            ready = reply.status
        async with session.get(f"{url}/metrics", timeout=timeout) as reply:
            page = await reply.text()
    return Sample(at, ready, {state: int(count) for state, count in _STATE.findall(page) if int(count)})


class Watch:
    """Asks each gateway, and the address in front of them, how it is. `async with` looks every `period` seconds."""

    def __init__(self, urls: Sequence[str], period: float = 1.0) -> None:
        self.samples: dict[str, list[Sample]] = {url: [] for url in urls}
        self._period = period

    async def __aenter__(self) -> "Watch":
        self._tasks = [asyncio.create_task(self._look(url)) for url in self.samples]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _look(self, url: str) -> None:
        async with aiohttp.ClientSession() as session:
            while True:
                self.samples[url].append(await look(session, url))
                await asyncio.sleep(self._period)

    def out_after(self, moment: float) -> dict[str, float | None]:
        """Seconds until each gateway had a replica out that was not before; None where it never had."""
        found: dict[str, float | None] = {}
        for url, samples in self.samples.items():
            before = [sample.states.get("out", 0) for sample in samples if sample.at < moment and sample.states]
            least = (before or [0])[-1]
            later = (one.at - moment for one in samples if one.at >= moment and one.states.get("out", 0) > least)
            first = next(later, None)
            found[url] = None if first is None else round(first, 1)
        return found

    def figures(self) -> dict[str, Any]:
        """By address: samples, those that said not ready or nothing, and those with a replica out."""
        return {
            url: {
                "samples": len(samples),
                "ready": dict(Counter(str(sample.ready) for sample in samples)),
                "with one out": sum(sample.states.get("out", 0) > 0 for sample in samples),
                "most out": max((sample.states.get("out", 0) for sample in samples), default=0),
            }
            for url, samples in self.samples.items()
        }


def engine_core(pid: int) -> int:
    """The process of a replica that computes its steps. Raises ClickException where it has none of its own."""
    for child in psutil.Process(pid).children(recursive=True):
        if child.name().startswith(ENGINE_CORE[:15]):
            return child.pid
    raise click.ClickException(f"replica {pid} has no process {ENGINE_CORE}")


def _answering(pid: int | None) -> str | None:
    """Where a process answers `/health`: Ray's own ports are among those that it listens on."""
    ports = {one.laddr.port for one in psutil.Process(pid).net_connections("tcp") if one.status == psutil.CONN_LISTEN}
    for port in sorted(ports):
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"http://127.0.0.1:{port}/health", timeout=_ANSWER_S).status_code == httpx.codes.OK:
                return f"http://127.0.0.1:{port}"
    return None
