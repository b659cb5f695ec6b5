"""Replies of every API and kind, streamed and whole, whose replica is killed: does each come out as without the kill?

    synthia-vllm cluster up --replicas 2 --port 8000 --engine.dtype float32 --engine.max-model-len 2048
    python -m benchmarks.resume --url http://127.0.0.1:8000 [--kind seed --rounds 10]

ids         what goes on from its token ids alone (greedy)
seed        a seeded sample: replayed, so that the generator of random numbers arrives where it was
penalties   presence and frequency penalties: replayed
json        a JSON schema: replayed, so that the grammar does

Each round sends all kinds of replies (four APIs, streamed and whole, twice), kills one replica with SIGKILL at a random
moment, and compares texts, ends and usage with the same requests undisturbed. In float32 they are equal.
"""

import asyncio
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp
import click

from synthia_vllm.bench.chaos_demo import PROMPTS, PidList, kill_one, pid_command
from synthia_vllm.bench.machine import machine

KINDS = ("ids", "seed", "penalties", "json")
APIS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")
_BACK_S = 300.0
_SETTLE_S = 12.0  # a new replica takes its full share only after `--replicas.slow-start-s`
_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {name: {"type": "string", "maxLength": 60} for name in ("title", "place", "plot", "moral")},
    "required": ["title", "place", "plot", "moral"],
    "additionalProperties": False,
}
_EXTRAS: dict[str, dict[str, Any]] = {
    "ids": {"temperature": 0},
    "seed": {"temperature": 0.8, "top_k": 50},
    "penalties": {"temperature": 0, "presence_penalty": 0.5, "frequency_penalty": 0.5},
    "json": {"temperature": 0, "structured_outputs": {"json": _SCHEMA}},
}


def requests(kind: str, tokens: int, turn: int) -> list[tuple[str, dict[str, Any]]]:
    """Route and body of sixteen requests, no two with one prompt."""
    found = []
    for number in range(16):
        route, streamed = APIS[number % 4], number // 4 % 2 == 0
        text = f"{PROMPTS[number % len(PROMPTS)]} ({turn}.{number})"
        extras = dict(_EXTRAS[kind])
        if kind == "seed":
            extras["seed"] = 1000 * turn + number
        body: dict[str, Any] = {"model": "synthia", "stream": streamed, **extras}
        if kind != "json":
            body["ignore_eos"] = True
        length = {"/v1/responses": "max_output_tokens"}.get(route, "max_tokens")
        body[length] = tokens
        if route == "/v1/completions":
            body["prompt"] = f"SYSTEM: You are a helpful assistant.\nUSER: {text}\nASSISTANT:"
        elif route == "/v1/responses":
            body["input"] = text
        else:
            body["messages"] = [{"role": "user", "content": text}]
        if streamed and route in APIS[:2]:
            body["stream_options"] = {"include_usage": True}
        found.append((route, body))
    return found


async def ask(session: aiohttp.ClientSession, url: str, route: str, body: dict[str, Any]) -> tuple[Any, ...]:
    """What came: text, end, prompt and generated tokens; or `broken` and why."""
    try:
        async with session.post(url + route, json=body) as reply:
            raw = await reply.text()
            if reply.status != 200:
                return "broken", f"{reply.status} {raw[:300]}"
    except aiohttp.ClientError as error:
        return "broken", repr(error)
    if not body["stream"]:
        return told(route, [json.loads(raw)])
    events = [part.rpartition("data: ")[2] for part in raw.split("\n\n") if "data: " in part]
    found = [json.loads(event) for event in events if event != "[DONE]"]
    for event in found:
        if event.get("error"):
            return "broken", str(event)[:300]
    return told(route, found)


def told(route: str, objects: list[dict[str, Any]]) -> tuple[Any, ...]:
    text, end = "", None
    usage: dict[str, Any] = {}
    for one in objects:
        if route in APIS[:2]:
            for choice in one["choices"]:
                delta = choice.get("delta") or choice.get("message") or choice
                text += delta.get("content") or choice.get("text") or ""
                end = choice.get("finish_reason") or end
            usage = one.get("usage") or usage
        elif route == "/v1/responses":
            whole = one.get("response") or (one if one.get("object") == "response" else None)
            if whole and whole["output"]:
                text, end, usage = whole["output"][0]["content"][0]["text"], whole["status"], whole["usage"]
        elif one["type"] == "message":
            text, end, usage = one["content"][0]["text"], one["stop_reason"], one["usage"]
        else:
            text += (one.get("delta") or {}).get("text") or ""
            end = (one.get("delta") or {}).get("stop_reason") or end
            usage = one.get("usage") or usage
    generated = usage.get("completion_tokens", usage.get("output_tokens"))
    return text, end, generated


async def one_round(url: str, kind: str, tokens: int, turn: int, who: PidList) -> dict[str, Any]:
    asked = requests(kind, tokens, turn)
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:

        async def everything() -> list[tuple[Any, ...]]:
            return list(await asyncio.gather(*(ask(session, url, *one) for one in asked)))

        began = time.monotonic()
        undisturbed = await everything()
        took = time.monotonic() - began
        pids = await who()
        running = asyncio.create_task(everything())
        after = took * random.uniform(0.1, 0.9)
        await asyncio.sleep(after)
        victim = kill_one(pids)
        replies = await running
    disturbed = time.monotonic() - began - took
    while victim in (now := await who()) or len(now) < len(pids):
        if time.monotonic() - began > _BACK_S:
            raise click.ClickException(f"not back at {len(pids)} engines after {_BACK_S:.0f} s")
        await asyncio.sleep(1)
    broken = [(asked[place][0], reply[1]) for place, reply in enumerate(replies) if reply[0] == "broken"]
    other = [
        {"route": asked[place][0], "streamed": asked[place][1]["stream"], "was": before, "is": reply}
        for place, (before, reply) in enumerate(zip(undisturbed, replies, strict=True))
        if reply[0] != "broken" and reply != before
    ]
    invalid = sum(kind == "json" and reply[1] not in _CUT and not _valid(reply[0]) for reply in replies)
    return {
        "kind": kind, "replies": len(replies), "broken": broken, "other": other, "invalid": invalid,
        "undisturbed_s": round(took, 2), "killed_after_s": round(after, 2), "disturbed_s": round(disturbed, 2),
    }  # fmt: skip


_CUT = ("length", "incomplete", "max_tokens")


def _valid(text: str) -> bool:
    try:
        return set(json.loads(text)) == set(_SCHEMA["required"])
    except ValueError:
        return False


@click.command()
@click.option("--url", required=True, help="Of a cluster with two replicas on this machine.")
@click.option("--kind", "kinds", type=click.Choice(KINDS), multiple=True, help="[default: all]")
@click.option("--rounds", type=click.IntRange(1), default=10, show_default=True, help="Kills of each kind.")
@click.option("--tokens", type=click.IntRange(8), default=150, show_default=True, help="Of each reply, at most.")
@click.option(
    "--pids", default=f"{sys.executable} -m synthia_vllm cluster status --json", help="Prints the engines' process ids."
)
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), default=None, help="JSON [default: none].")
def main(url: str, kinds: tuple[str, ...], rounds: int, tokens: int, pids: str, output: Path | None) -> None:
    """Kill replicas under replies of every API, and compare them with undisturbed ones."""
    who, found = pid_command(pids), []
    for turn in range(rounds):
        for kind in kinds or KINDS:
            one = asyncio.run(one_round(url, kind, tokens, turn, who))
            found.append(one)
            click.echo(
                f"{kind}, round {turn + 1} of {rounds}: {len(one['broken'])} of {one['replies']} broken, "
                f"{len(one['other'])} not as undisturbed, {one['invalid']} invalid; "
                f"{one['undisturbed_s']} s undisturbed, "
                f"{one['disturbed_s']} s with a kill after {one['killed_after_s']} s"
            )
            if output is not None:
                output.write_text(json.dumps({"machine": machine(), "rounds": found}, indent=1) + "\n")
            time.sleep(_SETTLE_S)
    if any(one["broken"] or one["invalid"] for one in found):
        sys.exit(1)


if __name__ == "__main__":
    main()
