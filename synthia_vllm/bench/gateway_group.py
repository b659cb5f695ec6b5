"""The group `gateways`: one engine, and before it nothing, our gateway, and each rival that is here.

The engine is a plain vLLM server, or with `Plan.null` a null engine, which shows what a gateway alone costs. All are
sent the same chats: the only route that every gateway has. What they are measured by is in `gateway_standing`.
"""

import asyncio
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import click

from synthia_vllm import __version__
from synthia_vllm.bench.client import Call, Client, Target
from synthia_vllm.bench.groups import GROUPS, TITLES
from synthia_vllm.bench.keys import make_key
from synthia_vllm.bench.peers import Plan, Say, Up, described, plain_vllm, version_of, vllm_distribution
from synthia_vllm.bench.processes import RunningServer, running
from synthia_vllm.bench.rivals import (
    DIRECT,
    GATEWAY,
    REQUESTS_PER_MINUTE,
    RIVALS,
    TOKENS_PER_MINUTE,
    Engine,
)
from synthia_vllm.bench.run_file import Server
from synthia_vllm.bench.streams import processor_seconds

NULL_MODEL = "null"
NULL_TOKENS_PER_SECOND = 20  # of each stream: at full speed the null engine would be the limit
# Of KV cache, that a null engine tells: more than all chats take, since it never looks whether they fit. With fewer our
# fair queue, which does look, would hold some back, where others send them all on.
NULL_BLOCKS = 2**18
# Not asked for: the Rust routers leave the ids out, and replies are to be as long for all.
_OMIT = frozenset({"return_token_ids"})
_ANSWERS_WITHIN_S = 20.0


@dataclass(frozen=True)
class Gateway:
    """How one is started before the engine, or why it can't be."""

    name: str
    command: list[str] = field(default_factory=list)
    environment: Mapping[str, str] = field(default_factory=dict)
    version: str = ""
    ready: str = "/health"
    key: str | None = None
    missing: str | None = None


@contextmanager
def gateways_group(plan: Plan, names: Sequence[str], logs: Path, say: Say) -> Iterator[list[Up]]:
    """The engine, and those of its gateways that were asked for, started one after the other and kept."""
    wanted = [name for name in GROUPS["gateways"] if name in names]
    folder = logs / "gateways"
    folder.mkdir()
    command = engine_command(plan)
    with ExitStack() as stack:
        say(f"starting {'a null engine' if plan.null else 'vLLM'} for the gateways")
        try:
            engine = stack.enter_context(running("engine", command, {}, folder))
        except click.ClickException as error:
            say(f"left out: {', '.join(wanted)}: {error.message}")
            yield [Up(Server(name=name, title=TITLES[name], missing=error.message)) for name in wanted]
            return
        # A null engine's own time would tell nothing of a server's. Not of the family: the engine core is a child.
        behind = None if plan.null else partial(processor_seconds, engine.pid)
        before = Engine(engine.url, plan.engine.name, folder)
        found = []
        if DIRECT in wanted:
            found.append(_direct(plan, command, engine, behind))
        for gateway in (*rival_gateways(plan, before, wanted), *([ours(plan, before)] if GATEWAY in wanted else [])):
            up = _start(gateway, plan, folder, stack, say)
            up.upstream = behind
            found.append(up)
        yield found


def engine_command(plan: Plan) -> list[str]:
    """A plain vLLM, which renders chats as our gateway does; or a null engine, paced."""
    from synthia_vllm.prompt import template_path

    if plan.null:
        paced = ["--tokens-per-second", str(NULL_TOKENS_PER_SECOND), "--num-gpu-blocks", str(NULL_BLOCKS)]
        return [sys.executable, "-m", "synthia_vllm.bench.null.engine", *paced]
    template = ["--chat-template", str(template_path()), "--chat-template-content-format", "string"]
    return [*plain_vllm(plan), *template, "--generation-config", "vllm"]


def rival_gateways(plan: Plan, engine: Engine, names: Sequence[str]) -> list[Gateway]:
    """Those of other makers that were asked for, the missing ones among them."""
    gateways = []
    for rival in RIVALS:
        if rival.name not in names:
            continue
        program, told = rival.find(plan.rivals)
        if program is None:
            gateways.append(Gateway(rival.name, missing=told))
            continue
        # Of our environment nothing is to be found in theirs.
        environment = {"PYTHONPATH": "", **rival.environment}
        command = [program, *rival.arguments(engine)]
        gateways.append(Gateway(rival.name, command, environment, told, rival.ready, rival.key))
    return gateways


def ours(plan: Plan, engine: Engine) -> Gateway:
    """Everything on: a key of a user with limits, the fair queue, the log, the bill."""
    data = engine.folder / GATEWAY
    if plan.null:
        from synthia_vllm.bench.null.tokenizer import write

        tokenizer = write(engine.folder / "tokenizer")
    else:
        tokenizer = Path(plan.engine.model)
    limits = ["--requests-per-minute", str(REQUESTS_PER_MINUTE), "--tokens-per-minute", str(TOKENS_PER_MINUTE)]
    key = make_key("bench", *limits, data=data)
    command = [sys.executable, "-m", "synthia_vllm", "gateway", "--access.mode", "keys", "--upstream", engine.url]
    # The hub's names are no folders: then prompts go as text.
    command += ["--tokenizer", str(tokenizer)] if tokenizer.is_dir() else []
    return Gateway(GATEWAY, command, {"SYNTHIA_DATA": str(data)}, __version__, key=key)


def _direct(plan: Plan, command: Sequence[str], engine: RunningServer, behind: partial[float] | None) -> Up:
    server = described(
        plan,
        DIRECT,
        command,
        title="the null engine, no gateway" if plan.null else TITLES[DIRECT],
        version=__version__ if plan.null else version_of(vllm_distribution()),
        startup_s=engine.startup_s,
    )
    return Up(server, Target(engine.url, plan.engine.name, chat=True, salt=f"/{DIRECT}", omit=_OMIT), upstream=behind)


def _start(gateway: Gateway, plan: Plan, folder: Path, stack: ExitStack, say: Say) -> Up:
    missing = gateway.missing
    process = target = None
    if missing is None:
        say(f"starting {gateway.name}: {TITLES[gateway.name]}")
        try:
            process = stack.enter_context(
                running(gateway.name, gateway.command, gateway.environment, folder, health=gateway.ready)
            )
        except (click.ClickException, OSError) as error:
            missing = error.message if isinstance(error, click.ClickException) else f"did not start: {error}"
    if process is not None:
        salt = f"/{gateway.name}"
        target = Target(process.url, plan.engine.name, gateway.key, chat=True, salt=salt, omit=_OMIT)
        missing = why_no_answer(target)
    server = described(
        plan,
        gateway.name,
        gateway.command,
        gateway.environment,
        version=gateway.version,
        startup_s=process.startup_s if process else None,
        missing=missing,
    )
    if process is None or missing is not None:
        say(f"left out: {gateway.name}: {missing}")
        return Up(server)
    return Up(server, target, process.memory_bytes, processor=partial(processor_seconds, process.pid, family=True))


def why_no_answer(target: Target, within_s: float = _ANSWERS_WITHIN_S) -> str | None:
    """None once a chat is answered: some are ready before they know their engine. Else what was wrong last."""

    async def ask() -> str | None:
        call = Call(2, messages=({"role": "user", "content": "Hello"},))
        async with Client(target) as client:
            found = await client.send(call, start=time.perf_counter(), due_s=0.0)
        return None if found.error is None else f"answers no chat: {found.error}: {found.detail}"

    deadline = time.monotonic() + within_s
    while (wrong := asyncio.run(ask())) is not None and time.monotonic() < deadline:
        time.sleep(0.5)
    return wrong
