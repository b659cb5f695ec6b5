"""Real engines that are killed: the part of `bench chaos` that runs against a gateway or cluster already there."""

import asyncio
import json
import os
import random
import re
import signal
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import click

from synthia_vllm.bench.checked_stream import COMPLETIONS, CheckedStream, Wanted, run_stream

PROMPTS = (
    "What is an orca?", "Why is the sky blue?", "Tell me a story about a lighthouse.", "How does bread rise?",
    "Explain tides to a child.", "What do bees do in winter?", "Describe a city at night.", "How is glass made?",
)  # fmt: skip
_BACK_S = 300.0
_LOOK_S = 0.5
# A new replica takes its full share of requests only after `--replicas.slow-start-s`.
_SETTLE_S = 12.0

PidList = Callable[[], Awaitable[list[int]]]


async def run_demo(
    streams: int, say: Callable[[str], None], *, url: str, key: str | None, pids: str, rounds: int, tokens: int
) -> dict[str, Any]:
    """Rounds of kills; see `synthia_vllm.bench.chaos`. Raises ClickException where the engines don't come back."""
    asked = [_wanted(number, tokens, key) for number in range(streams)]
    who = pid_command(pids)
    full = len(await who())
    if full < 2:
        raise click.ClickException(f"{pids!r} names {full} engines; a killed one needs another to go to")
    began = time.monotonic()
    undisturbed = await _round(url, asked)
    took = time.monotonic() - began
    for stream in undisturbed:
        if stream.broken is not None:
            raise click.ClickException(f"broken without a kill: {stream.broken} {stream.offending!r}")
    texts = ["".join(stream.text) for stream in undisturbed]
    say(f"undisturbed: {streams} streams of {tokens} tokens in {took:.1f} s")
    results = []
    for number in range(rounds):
        found = await _disturbed(url, asked, who, took * random.uniform(0.1, 0.9), texts)
        results.append(found)
        if number + 1 < rounds:
            await asyncio.sleep(_SETTLE_S)
        seen = f"{len(found['broken_streams'])} broken, {found['other_texts']} other texts"
        say(
            f"round {number + 1} of {rounds}: {seen}, "
            f"longest pause {max(found['pauses'], default=0.0)} s, full strength after {found['back_after_s']} s"
        )
    broken = [one for found in results for one in found.pop("broken_streams")]
    pauses = [pause for found in results for pause in found["pauses"]]
    summary: dict[str, Any] = {
        "streams": streams * rounds,
        "tokens": streams * rounds * tokens,
        "kills": rounds,
        "broken streams": len(broken),
        "texts unlike those without a kill": sum(found["other_texts"] for found in results),
    }
    if pauses:
        ordered = sorted(pauses)
        summary |= {
            "pause at a kill, s, p50": round(ordered[len(ordered) // 2], 3),
            "pause at a kill, s, p95": round(ordered[int(len(ordered) * 0.95)], 3),
            "pause at a kill, s, max": round(ordered[-1], 3),
        }
    summary["full strength again after, s, max"] = max(found["back_after_s"] for found in results)
    options = {"streams": streams, "tokens": tokens, "rounds": rounds}
    return {"options": options, "summary": summary, "broken": broken[:20], "rounds": results}


def pid_command(command: str) -> PidList:
    """Asks a command: the running engines of `synthia-vllm cluster status --json`, or any numbers that it prints."""

    async def ask() -> list[int]:
        process = await asyncio.create_subprocess_shell(command, stdout=asyncio.subprocess.PIPE)
        out, _ = await process.communicate()
        try:
            found = json.loads(out)
        except json.JSONDecodeError:
            return [int(word) for word in re.findall(rb"\d+", out)]
        if not isinstance(found, dict):
            return [found] if isinstance(found, int) else list(found)
        replicas = found.get("applications", {}).get("engine", {}).get("replicas", [])
        return [replica["pid"] for replica in replicas if replica["state"] == "RUNNING" and replica["pid"]]

    return ask


def kill_one(pids: list[int]) -> int:
    """`kill -9` of one of them. Raises ClickException where there is none."""
    if not pids:
        raise click.ClickException("no engine is left to kill: was the cluster stopped?")
    victim = random.choice(pids)
    os.kill(victim, signal.SIGKILL)
    return victim


async def _disturbed(url: str, asked: list[Wanted], who: PidList, after: float, texts: list[str]) -> dict[str, Any]:
    loop = asyncio.get_running_loop()
    pids = await who()
    running = asyncio.create_task(_round(url, asked))
    try:
        await asyncio.sleep(after)
        at = loop.time()
        victim = kill_one(pids)
        # Asking takes a good part of a core: not while the streams run, whose pauses are measured.
        streams = await running
        await _back(who, victim, len(pids))
        back_after = loop.time() - at
    finally:
        running.cancel()
    other = sum("".join(stream.text) != text for stream, text in zip(streams, texts, strict=True))
    # Which streams the killed one had is not known here; the longer half of the pauses is at least those.
    pauses = sorted(pause for stream in streams if (pause := stream.pause_at(at)) is not None)
    return {
        "killed_after_s": round(after, 2),
        "back_after_s": round(back_after, 1),
        "other_texts": other,
        "pauses": [round(pause, 3) for pause in pauses[len(pauses) // 2 :]],
        "broken_streams": [
            {"reason": stream.broken, "bytes": stream.offending.decode(errors="replace")}
            for stream in streams
            if stream.broken is not None
        ],
    }


async def _round(url: str, asked: list[Wanted]) -> list[CheckedStream]:
    # Sessions that nobody has seen: the replica of the round before is not preferred.
    wanted = [replace(one, session=uuid.uuid4().hex) for one in asked]
    return list(await asyncio.gather(*(run_stream(url, one) for one in wanted)))


async def _back(who: PidList, victim: int, count: int) -> None:
    """Returns once as many engines as before run again, without the killed one."""
    began = time.monotonic()
    while True:
        pids = await who()
        if victim not in pids and len(pids) >= count:
            return
        if time.monotonic() - began > _BACK_S:
            raise click.ClickException(f"not back at {count} engines after {_BACK_S:.0f} s")
        await asyncio.sleep(_LOOK_S)


def _wanted(number: int, tokens: int, key: str | None) -> Wanted:
    # A number of its own: no two prompts are alike, and the prefix cache helps none. Not as a chat, whose reply ends
    # where the model writes USER:.
    prompt = f"SYSTEM: You are a helpful assistant.\nUSER: {PROMPTS[number % len(PROMPTS)]} ({number})\nASSISTANT:"
    body = {"model": "synthia", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    options = {"stream": True, "stream_options": {"include_usage": True}}
    return Wanted(COMPLETIONS, body | options, tokens, None, key)
