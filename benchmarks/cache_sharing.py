"""What sharing the prefix cache tells of others, and what keeping users apart costs, on the real engine.

    python -m benchmarks.cache_sharing [--rounds 20] [--output benchmarks/results/cache_sharing.json]

One `synthia-vllm serve` is the engine; a gateway for each mode of `--prompt.cache-sharing` is in front of it, as in the
Compose files. In each round, and by each gateway, these ask for one token with a system prompt of 2,000 tokens, one
after the other:

first   a user, with a prompt that nobody has sent
same    the same user again
group   another user of the same group
other   a user of another group: the one who would like to know
fresh   the same, with a prompt that nobody has sent, just before or after

What the other one can tell is the difference between `other` and `fresh`: its median within the rounds with its 99 %
interval (bootstrap), and how often a guess by one pair of times would be right, where 50 % is no knowledge at all.
"""

import asyncio
import json
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import aiohttp
import click
from rich.console import Console
from rich.table import Table

from synthia_vllm import __version__
from synthia_vllm.bench.keys import make_key
from synthia_vllm.bench.machine import machine
from synthia_vllm.bench.processes import running
from synthia_vllm.bench.rounds import in_turn
from synthia_vllm.engine.demo import demo_model
from synthia_vllm.engine.tokenizer import Tokenizer

MODES = ("all", "group", "user")
PROMPT_TOKENS = 2000
_USERS = {"first": "research:ann", "same": "research:ann", "group": "research:bob", "other": "sales:eve"}
_USERS["fresh"] = _USERS["other"]
_ENGINE = ("--engine.max-model-len", "4096", "--engine.kv-cache-gib", "1")
# Named, since three gateways before one engine don't know of each other; each has a third.
_ROOM = ("--fair.gateways", "3", "--fair.max-in-flight-tokens", "49152", "--fair.max-in-flight-requests", "12")
_QUIET = ("--replicas.canary-period-s", "300", "--replicas.canary-deadline-s", "300")  # canaries would be in the way
_WORDS = ("orca", "whale", "sea", "north", "cold", "water", "hunt", "pod", "calf", "song", "ice", "deep")
_RESAMPLES, _TAIL = 2000, 0.005
_LEVEL = f"{100 * (1 - 2 * _TAIL):g} %"

Answer = tuple[float, int]  # seconds to the first token, prompt tokens that were in the cache
Results = dict[str, dict[str, list[float]]]  # mode: who: one value a round


@click.command()
@click.option("--rounds", type=click.IntRange(3), default=20, show_default=True, help="Interleaved repeats.")
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path(__file__).with_name("results") / "cache_sharing.json",
    show_default="benchmarks/results/cache_sharing.json",
)
def main(rounds: int, output: Path) -> None:
    """Measure the time to the first token the second time, for the same user and for others, in each mode."""
    console = Console()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    tokenizer = Tokenizer.load(demo_model())
    ttft: Results = {mode: {who: [] for who in _USERS} for mode in MODES}
    cached: Results = {mode: {who: [] for who in _USERS} for mode in MODES}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        command = [sys.executable, "-m", "synthia_vllm"]
        console.print("starting the engine", highlight=False)
        serve = [*command, "serve", "--model", "demo", "--log-file", "-", *_ENGINE]
        engine = stack.enter_context(running("engine", serve, {"SYNTHIA_DATA": str(folder / "engine")}, folder))
        environment = {"SYNTHIA_DATA": str(folder / "gateways")}
        keys = {user: make_key(user, data=folder / "gateways") for user in dict.fromkeys(_USERS.values())}
        gateways = {}
        for mode in MODES:
            words = [*command, "gateway", "--upstream", engine.url, "--access.mode", "keys", *_ROOM, *_QUIET]
            words += ["--tokenizer", str(demo_model()), "--prompt.cache-sharing", mode]
            gateways[mode] = stack.enter_context(running(mode, words, environment, folder, health="/ready")).url
        for number in range(-1, rounds):  # round -1 warms up and is not counted
            for mode in in_turn(MODES, number):
                for who, (seconds, tokens) in asyncio.run(one_round(gateways[mode], keys, tokenizer)).items():
                    if number >= 0:
                        ttft[mode][who].append(seconds)
                        cached[mode][who].append(tokens)
            console.print(f"round {number + 1} of {rounds} done", highlight=False)
    report: dict[str, Any] = {"machine": machine(), "version": __version__, "rounds": rounds}
    report |= {"prompt_tokens": PROMPT_TOKENS, "ttft_s": ttft, "cached_tokens": cached}
    report["summary"] = {mode: summary(ttft[mode], cached[mode]) for mode in MODES}
    output.write_text(json.dumps(report, indent=1) + "\n")
    console.print(table(report))
    for mode in MODES:
        console.print(verdict(mode, report["summary"][mode]), highlight=False)
    console.print(f"written to {output}", highlight=False)


async def one_round(url: str, keys: Mapping[str, str], tokenizer: Tokenizer) -> dict[str, Answer]:
    """All of them in their order, one at a time."""
    prompt, unknown = system_prompt(tokenizer), system_prompt(tokenizer)
    order = ["first", "same", "group", *random.sample(["other", "fresh"], 2)]
    timeout = aiohttp.ClientTimeout(300)
    async with aiohttp.ClientSession(url, timeout=timeout) as session:
        return {who: await ask(session, keys[_USERS[who]], unknown if who == "fresh" else prompt) for who in order}


async def ask(session: aiohttp.ClientSession, key: str, system: str) -> Answer:
    """One token of a streamed chat. Raises ClickException where there is none."""
    body = {
        "model": "synthia", "max_tokens": 1, "temperature": 0, "stream": True,
        "stream_options": {"include_usage": True},
        "messages": [{"role": "system", "content": system}, {"role": "user", "content": "What is an orca?"}],
    }  # fmt: skip
    first, usage = None, None
    began = time.perf_counter()
    async with session.post("/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {key}"}) as reply:
        async for line in reply.content:
            if line.startswith(b"data: {"):
                first = first or time.perf_counter() - began
                usage = json.loads(line[len(b"data: ") :]).get("usage") or usage
    if reply.status != 200 or first is None or usage is None:
        raise click.ClickException(f"{session._base_url}: answered {reply.status}, and no token came")
    return first, (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0


def system_prompt(tokenizer: Tokenizer) -> str:
    """A text of 2,000 tokens that is another one from its first token on."""
    text = f"{random.getrandbits(64):x} " + " ".join(random.choices(_WORDS, k=PROMPT_TOKENS))
    return tokenizer.decode(tokenizer.encode(text)[:PROMPT_TOKENS], skip_special_tokens=True)


def summary(ttft: Mapping[str, Sequence[float]], cached: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Medians in ms and in tokens, and what the other user can tell."""
    found: dict[str, Any] = {f"{who}, ms": round(1000 * statistics.median(times), 1) for who, times in ttft.items()}
    found |= {f"{who}, cached": statistics.median(tokens) for who, tokens in cached.items()}
    gaps = [1000 * (other - fresh) for other, fresh in zip(ttft["other"], ttft["fresh"], strict=True)]
    draws = random.Random(0)
    medians = sorted(statistics.median(draws.choices(gaps, k=len(gaps))) for _ in range(_RESAMPLES))
    low, high = medians[round(_TAIL * _RESAMPLES)], medians[-1 - round(_TAIL * _RESAMPLES)]
    pairs = [(other < fresh) + (other == fresh) / 2 for other in ttft["other"] for fresh in ttft["fresh"]]
    right = max(statistics.mean(pairs), 1 - statistics.mean(pairs))
    found["other - fresh, ms"] = round(statistics.median(gaps), 1)
    found["interval, ms"] = [round(low, 1), round(high, 1)]
    found["guessed right"] = round(right, 3)
    found["measurable"] = not low <= 0 <= high
    return found


def verdict(mode: str, found: Mapping[str, Any]) -> str:
    """What one user can tell of another's prompts in this mode."""
    low, high = found["interval, ms"]
    told = "a measurable difference" if found["measurable"] else "no measurable difference"
    return (
        f"{mode}: {told} across users: {found['other - fresh, ms']:+.1f} ms ({_LEVEL}: {low:+.1f} to {high:+.1f}), "
        f"{100 * found['guessed right']:.0f} % of guesses right, {found['other, cached']:.0f} tokens of theirs found"
    )


def table(report: Mapping[str, Any]) -> Table:
    shown = Table("mode", *_USERS, "other - fresh", title="median TTFT, ms")
    for mode, found in report["summary"].items():
        shown.add_row(mode, *(f"{found[f'{who}, ms']:.0f}" for who in _USERS), f"{found['other - fresh, ms']:+.1f}")
    return shown


def markdown(report: Mapping[str, Any]) -> str:
    """The lines that the page on security quotes."""
    lines = ""
    for mode, found in report["summary"].items():
        first, same, group, other = (f"{found[f'{who}, ms']:.0f}" for who in ("first", "same", "group", "other"))
        low, high = found["interval, ms"]
        lines += (
            f"- `{mode}`: {first} ms where nobody has asked it, {same} ms again, {group} ms for another of the group, "
            f"{other} ms for others.\n  To these it makes a difference of {found['other - fresh, ms']:+.0f} ms "
            f"({_LEVEL}: {low:+.0f} to {high:+.0f}) whether anybody has asked it.\n"
        )
    return lines


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main()
