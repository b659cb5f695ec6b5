"""Rounds: every workload on every server in turn, A B C … A B C, so that drift of the machine meets all alike."""

import dataclasses
import time
from collections.abc import Callable, Sequence

from synthia_vllm.bench.measuring import Terms, measure
from synthia_vllm.bench.peers import Say, Up
from synthia_vllm.bench.profiles import PROMPT, Part
from synthia_vllm.bench.prompts import Span
from synthia_vllm.bench.run_file import Measurement
from synthia_vllm.bench.workloads import ClosedLoop

WARM_UP = ClosedLoop(64, 64, PROMPT, Span(8, 8), "warm-up")
_WARM_UP_S = 10.0


async def warm_up(servers: Sequence[Up], terms: Terms, say: Say, workload: ClosedLoop = WARM_UP) -> None:
    """Sends as many streams at once as will be, uncounted; then each is weighed. Tells of replies that go wrong."""
    short = dataclasses.replace(terms, limit_s=_WARM_UP_S)
    for up in servers:
        if up.target is not None:
            found = await measure(up.target, workload, short, server=up.server.name, number=-1)
            wrong = [request for request in found.requests if request.error]
            if wrong:
                share = f"{len(wrong)} of {len(found.requests)} requests went wrong"
                say(f"{up.server.name}: {share}: {wrong[0].error}: {wrong[0].detail}")
        if up.memory is not None:
            up.server = up.server.model_copy(update={"memory_bytes": up.memory()})


async def run_rounds(
    servers: Sequence[Up],
    parts: Sequence[Part],
    rounds: int,
    terms: Terms,
    *,
    until: float,
    done: Callable[[Measurement], None],
    say: Say,
) -> None:
    """Up to `rounds` rounds; one that would not end before `until` (`time.monotonic`) is not begun, but the first is.

    `done` gets each measurement as soon as it is there.
    """
    up = [server for server in servers if server.target is not None]
    took: dict[int, float] = {}
    for number in range(rounds):
        due = [at for at, part in enumerate(parts) if part.rounds is None or number < part.rounds]
        if number and time.monotonic() + sum(took[at] for at in due) > until:
            say(f"{number} of {rounds} rounds: another would take longer than there is time")
            return
        for at in due:
            began = time.monotonic()
            part = parts[at]
            wanted = [server for server in up if part.servers is None or server.server.name in part.servers]
            for server in rotated(wanted, number):
                assert server.target is not None
                used = {"processor_s": server.processor, "upstream_processor_s": server.upstream}
                before = {name: seconds() for name, seconds in used.items() if seconds}
                found = await measure(
                    server.target,
                    part.workload,
                    terms_of(part, server, terms),
                    server=server.server.name,
                    number=number,
                )
                spent = {name: round(seconds() - before[name], 3) for name, seconds in used.items() if seconds}
                done(found.model_copy(update=spent))
            took[at] = time.monotonic() - began


def terms_of(part: Part, up: Up, terms: Terms) -> Terms:
    """Only a closed loop is ended early, which sends the same however long it lasts, and only where that is needed."""
    if part.workload.kind == "closed" and up.limited:
        return terms
    return dataclasses.replace(terms, limit_s=None)


def rotated(servers: Sequence[Up], by: int) -> list[Up]:
    """No server is always the first."""
    at = by % max(1, len(servers))
    return [*servers[at:], *servers[:at]]
