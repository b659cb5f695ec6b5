"""What clients notice of a cluster's rollouts, deaths, overload and hangs: two real replicas on this machine.

    python -m benchmarks.disruptions [--scene deaths --rounds 10] [--save]

rollout   to another engine option, and to one replica and back, while 6 clients ask for whole replies and 6 stream
deaths    `kill -9` of a replica under 24 whole replies, and under 24 streams whose prompts are still computed
overload  four times what runs at once, with two gateways: is a healthy replica ever out, what do the canaries cost
hang      SIGSTOP of a replica, or of its engine's process, under the same overload: when is it out
node      SIGTERM of another node's raylet under load (`benchmarks.second_node`)

Starts a cluster of its own and ends it. Where SYNTHIA_DATA is set, the cluster that has its state there is used, and
left running with --keep. Exit code 1 where a reply was lost or came too late.
"""

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from statistics import median
from typing import Any

import click

from benchmarks.disruption_load import Clients, Reply, Request, figures
from benchmarks.disruption_watch import Cluster, Starts, Watch, engine_core
from benchmarks.second_node import node
from synthia_vllm import __version__
from synthia_vllm.bench.chaos_demo import kill_one
from synthia_vllm.bench.machine import machine
from synthia_vllm.bench.rounds import in_turn
from synthia_vllm.settings import ReplicasSettings

_REPLICAS = 2
_WORDS = ("--engine.max-model-len", "2048", "--engine.kv-cache-gib", "1", "--engine.dtype", "float32")
_REPLY_S, _UNDISTURBED_S, _AROUND_S = 10.0, 30.0, 3.0
_CROWD = 24
_AT_ONCE = 16  # requests that an engine runs at once, in the overload
_PATIENT = ("--fair.max-wait-s", "600")  # who waits a minute for a turn is refused else
_NO_CANARIES = ("--replicas.canary-period-s", "3600")
_STOP_AFTER_S = 10.0
_LEAST_RATIO = 0.95
_DEADLINE_S = ReplicasSettings().canary_deadline_s

Scene = Callable[[Cluster, int], Coroutine[Any, Any, dict[str, Any]]]


async def rollout(cluster: Cluster, rounds: int) -> dict[str, Any]:
    """Another engine option, then one replica fewer and one more, in mid-load."""
    await cluster.up()
    found: dict[str, Any] = {}
    for number in range(rounds):
        option = ("--max-num-seqs", str(128 + number))
        await cluster.whole(_REPLICAS)
        async with Clients(cluster.url) as clients:
            asked = await _crowd(clients)
            undisturbed = await clients.closed_loop(asked, _after(_UNDISTURBED_S))
            base = figures(undisturbed)["slowest_s"]
            cluster.say(f"undisturbed: {_told(undisturbed)}; {asked[0].tokens} tokens each")
            steps: dict[str, list[tuple[str, ...]]] = {
                "to another option": [()],
                "2 to 1 to 2": [("--replicas", "1"), ()],
            }
            for name, changes in steps.items():
                async with Starts(cluster) as starts:
                    enough = asyncio.Event()
                    running = asyncio.create_task(clients.closed_loop(asked, enough))
                    await asyncio.sleep(_AROUND_S)
                    took = [await cluster.up(*change, vllm=option) for change in changes]
                    await asyncio.sleep(_AROUND_S)
                    enough.set()
                    replies = await running
                one = {**figures(replies), "undisturbed_s": base, "took_s": [round(each, 1) for each in took]}
                one |= {"start_s": starts.seconds, "times_undisturbed": round(one["slowest_s"] / base, 2)}
                one["late"] = sum(reply.seconds > 3 * base for reply in replies)
                found.setdefault(name, []).append(one)
                cluster.say(f"{name}: {_told(replies)}, {base} s undisturbed; new replicas took {starts.seconds} s")
    return found


async def deaths(cluster: Cluster, rounds: int) -> dict[str, Any]:
    """A replica killed under whole replies, and under streams in prefill."""
    await cluster.up()
    cases = {
        "whole replies": (Request(150), (0.1, 0.9)),
        "streams in prefill": (Request(16, streamed=True, long=True), (0.1, 0.4)),
    }
    found: dict[str, Any] = {name: [] for name in cases}
    for number in range(rounds):
        for name, (request, moments) in cases.items():
            await cluster.whole(_REPLICAS)
            one = await _death(cluster, [request] * _CROWD, random.uniform(*moments))
            found[name].append(one)
            cluster.say(
                f"{name}, round {number + 1} of {rounds}: {one['failed']} of {one['replies']} lost, the last after "
                f"{one['slowest_s']} s, {one['undisturbed_s']} s undisturbed; killed after {one['killed_after_s']} s, "
                f"back {one['back_after_s']} s after the last"
            )
    return found


async def _death(cluster: Cluster, requests: Sequence[Request], moment: float) -> dict[str, Any]:
    async with Clients(cluster.url) as clients:
        undisturbed = figures(await clients.at_once(requests))
        if undisturbed["failed"]:
            raise click.ClickException(f"lost without a kill: {undisturbed['reasons']}")
        pids = [replica.pid or 0 for replica in await cluster.replicas()]
        running = asyncio.create_task(clients.at_once(requests))
        after = moment * undisturbed["slowest_s"]
        await asyncio.sleep(after)
        victim = kill_one(pids)
        one = figures(await running)
    back = await cluster.whole(_REPLICAS, victim, settle=0)
    base = undisturbed["slowest_s"]
    times = {"undisturbed_s": base, "killed_after_s": round(after, 2), "back_after_s": round(back, 1)}
    late = int(one["slowest_s"] > 2 * base + 5)
    return {**one, **times, "times_undisturbed": round(one["slowest_s"] / base, 2), "late": late}


async def overload(cluster: Cluster, rounds: int) -> dict[str, Any]:
    """Four times what runs at once, with canaries and practically without."""
    found: dict[str, list[dict[str, Any]]] = {"with canaries": [], "without": []}
    for number in range(rounds):
        for name in in_turn(list(found), number):
            await _up_for_overload(cluster, *(_NO_CANARIES if name == "without" else ()))
            watch = Watch([cluster.url, *await cluster.gateways()])
            began = time.monotonic()
            async with watch, Clients(cluster.url) as clients:
                replies = await clients.at_once(_four_times())
            rate = sum(reply.tokens for reply in replies) / (time.monotonic() - began)
            one = {**figures(replies), "tokens_s": round(rate, 1), "gateways": watch.figures()}
            found[name].append(one)
            cluster.say(f"{name}, round {number + 1} of {rounds}: {_told(replies)}, {rate:.1f} tokens/s; {_out(watch)}")
    pairs = zip(found["with canaries"], found["without"], strict=True)
    ratio = median(one["tokens_s"] / max(other["tokens_s"], 0.1) for one, other in pairs)
    cluster.say(f"throughput, with canaries / without: {ratio:.3f}")
    return {**found, "with canaries / without": round(ratio, 3)}


async def hang(cluster: Cluster, rounds: int) -> dict[str, Any]:
    """A replica stopped under overload: its server, killed afterwards, or its engine, which goes on afterwards."""
    found: dict[str, list[dict[str, Any]]] = {"server": [], "engine": []}
    for number in range(rounds):
        for name, done in found.items():
            await _up_for_overload(cluster)
            pid = random.choice([replica.pid or 0 for replica in await cluster.replicas()])
            stopped = pid if name == "server" else engine_core(pid)
            watch = Watch(await cluster.gateways(), period=0.5)
            async with watch, Clients(cluster.url) as clients:
                running = asyncio.create_task(clients.at_once(_four_times()))
                await asyncio.sleep(_STOP_AFTER_S)
                moment = time.monotonic()
                os.kill(stopped, signal.SIGSTOP)
                try:
                    replies = await running
                finally:
                    with suppress(ProcessLookupError):  # Serve has replaced it
                        os.kill(stopped, signal.SIGKILL if name == "server" else signal.SIGCONT)
            seconds = watch.out_after(moment)
            late = sum(after is None or after > 2 * _DEADLINE_S for after in seconds.values())
            done.append({**figures(replies), "out_after_s": seconds, "late": late, "gateways": watch.figures()})
            cluster.say(
                f"{name} stopped, round {number + 1} of {rounds}: out after {list(seconds.values())} s "
                f"(deadline {_DEADLINE_S:g} s); {_told(replies)}"
            )
    return found


async def second_node(cluster: Cluster, rounds: int) -> dict[str, Any]:
    return {"raylet ended": [await node(cluster.say) for _ in range(rounds)]}


SCENES: dict[str, Scene] = {
    "rollout": rollout, "deaths": deaths, "overload": overload, "hang": hang, "node": second_node,
}  # fmt: skip


async def _crowd(clients: Clients) -> list[Request]:
    """Six clients that ask for whole replies and six that stream, each reply about ten seconds long."""
    sample = [Request(60)] * 6 + [Request(60, streamed=True)] * 6
    await clients.at_once(sample)  # the first ones warm up
    seconds = median(reply.seconds for reply in await clients.at_once(sample))
    tokens = min(1900, round(60 * _REPLY_S / seconds))
    return [Request(tokens)] * 6 + [Request(tokens, streamed=True)] * 6


async def _up_for_overload(cluster: Cluster, *words: str) -> None:
    await cluster.up("--gateways", "2", *_PATIENT, *words, vllm=("--max-num-seqs", str(_AT_ONCE)))
    await cluster.whole(_REPLICAS)


def _four_times() -> list[Request]:
    return [Request(200), Request(16, long=True)] * (2 * _REPLICAS * _AT_ONCE)


def _after(seconds: float) -> asyncio.Event:
    event = asyncio.Event()
    asyncio.get_running_loop().call_later(seconds, event.set)
    return event


def _told(replies: Sequence[Reply]) -> str:
    found = figures(replies)
    reasons = f" {found['reasons']}" if found["reasons"] else ""
    return f"{found['failed']} of {found['replies']} failed{reasons}, slowest {found['slowest_s']} s"


def _out(watch: Watch) -> str:
    """The front's samples show one gateway or the other."""
    told = []
    for figure in watch.figures().values():
        unready = figure["samples"] - figure["ready"].get("200", 0)
        told.append(f"{unready} not ready and {figure['with one out']} with one out of {figure['samples']}")
    return "samples, front and gateways: " + ", ".join(told)


def shortcomings(found: dict[str, Any]) -> list[str]:
    """What is not as promised: lost and late replies, and of an overload what it may not do to healthy replicas."""
    told = []
    for scene, cases in found.items():
        for case, rounds in cases.items():
            for one in rounds if isinstance(rounds, list) else ():
                told += [f"{scene}, {case}: {one[word]} {word}" for word in ("failed", "late") if one.get(word)]
                if scene == "overload":
                    told += [f"{scene}, {case}: {what}" for what in _unhealthy(one["gateways"].values())]
    ratio = found.get("overload", {}).get("with canaries / without", 1.0)
    if ratio < _LEAST_RATIO:
        told.append(f"overload: throughput {ratio} of that without canaries")
    return told


def _unhealthy(gateways: Iterable[dict[str, Any]]) -> list[str]:
    each = list(gateways)
    out = sum(one["with one out"] for one in each)
    unready = sum(one["samples"] - one["ready"].get("200", 0) for one in each)
    told = [f"a healthy replica was out in {out} samples"] if out else []
    return told + ([f"not ready in {unready} samples"] if unready else [])


@click.command()
@click.option("--scene", "scenes", type=click.Choice(list(SCENES)), multiple=True, help="[default: all]")
@click.option("--rounds", type=click.IntRange(1), default=None, help="Of each scene [default: 10 deaths, 2 of others].")
@click.option("--port", default=8200, show_default=True, help="Where the cluster answers.")
@click.option("--keep", is_flag=True, help="Leave the cluster running, where SYNTHIA_DATA is set.")
@click.option("--save", is_flag=True, help="Write the figures of these scenes to benchmarks/results/disruptions.json.")
def main(scenes: tuple[str, ...], rounds: int | None, port: int, keep: bool, save: bool) -> None:
    """Disturb a cluster of two replicas under load, and count what its clients lose."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the cluster is stopped then too
    found: dict[str, Any] = {}
    began = time.monotonic()
    with ExitStack() as stack:
        if "SYNTHIA_DATA" not in os.environ:
            os.environ["SYNTHIA_DATA"] = stack.enter_context(tempfile.TemporaryDirectory())
            keep = False
        if not keep:
            stack.callback(_down)

        def say(text: str) -> None:
            click.echo(f"{time.monotonic() - began:6.0f} s  {text}")

        cluster = Cluster(port, ("--replicas", str(_REPLICAS), *_WORDS), say)
        for scene in scenes or SCENES:
            say(scene)
            if scene == "node":
                _down()
            found[scene] = asyncio.run(SCENES[scene](cluster, rounds or (10 if scene == "deaths" else 2)))
            if save:
                _save(found)
    told = shortcomings(found)
    click.echo("\n".join(told) or "all as promised")
    sys.exit(1 if told else 0)


def _down() -> None:
    subprocess.run([sys.executable, "-m", "synthia_vllm", "cluster", "down", "--now"], check=False)


def _save(found: dict[str, Any]) -> None:
    output = Path(__file__).with_name("results") / "disruptions.json"
    before = json.loads(output.read_text())["scenes"] if output.exists() else {}
    report = {"machine": machine(), "version": __version__, "scenes": before | found}
    output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
