"""The crowds benchmark's own parts: what it calls lost, whose pauses it takes, what it says was missed."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from click.testing import CliRunner

from benchmarks.crowds import Loss, loss_figures, main, missed
from synthia_vllm.bench.checked_crowd import Told, crowd
from synthia_vllm.bench.checked_stream import COMPLETIONS, numbered
from synthia_vllm.bench.null.engine import NullEngine
from synthia_vllm.bench.null.faults import Faults
from tests.gateway.live import serving

LENGTHS: dict[str, Any] = {"tokens": (4, 6), "prompts": (30, 40)}


async def outcomes(engine: NullEngine) -> list[str]:
    """Of a stream and a whole reply."""
    with serving(engine) as port:
        async with crowd([f"http://127.0.0.1:{port}"], **LENGTHS) as asked:
            return [(await asked.ask(number)).outcome for number in (3, 2)]


@pytest.mark.parametrize(
    ("faults", "found"),
    [
        (Faults(), ["right", "right"]),
        (Faults(status=502), ["lost", "lost"]),
        (Faults(status=503), ["refused", "refused"]),
        (Faults(break_after=3), ["broken", "right"]),
        (Faults(end_after=3), ["broken", "right"]),
        (Faults(usage_lie=1), ["wrong", "wrong"]),
    ],
    ids=["well", "fails", "refuses", "breaks", "ends", "lies"],
)
async def test_what_became_of_a_reply(faults: Faults, found: list[str]) -> None:
    assert await outcomes(NullEngine(numbered=True, faults=faults)) == found


async def test_a_whole_reply_with_another_text_is_wrong() -> None:
    assert await outcomes(NullEngine(text=" other")) == ["wrong", "wrong"]


async def test_nobody_there_is_lost(unused_tcp_port: int) -> None:
    async with crowd([f"http://127.0.0.1:{unused_tcp_port}"], **LENGTHS) as asked:
        assert [(await asked.ask(number)).outcome for number in (3, 2)] == ["lost", "lost"]


async def test_so_many_at_once_and_so_many_in_all() -> None:
    most = 0

    async def answer(request: web.Request) -> web.Response:
        nonlocal most
        most = max(most, asked.open)
        await asyncio.sleep(0.05)
        return web.Response(status=502)

    app = web.Application()
    app.router.add_post("/{path:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        async with crowd([f"http://127.0.0.1:{runner.addresses[0][1]}"], **LENGTHS) as asked:
            await asked.run(3, 10)
        assert most == 3
        assert len(asked.done) == 10
        assert sum(told.whole for told in asked.done) == 5
    finally:
        await runner.cleanup()


def test_pauses_are_of_those_whose_engine_was_killed() -> None:
    def told(prompt: str, *, whole: bool = False, first: float | None = 1.0, gap: float = 0.0) -> Told:
        wanted = numbered(COMPLETIONS, prompt, 20)
        return Told(wanted, whole, 8, 0.0, 9.0, gaps=lambda _: gap or None, first=first)

    replies = [
        told("struck", gap=1.5),
        told("waits for its first token", first=5.5),
        told("elsewhere", gap=7.0),
        told("whole", whole=True, first=None),
        told("also whole", whole=True, first=None),
    ]
    seeds = {replies[at].wanted.seed or 0 for at in (0, 1, 3)}
    summary = loss_figures(replies, [Loss(5.0, "null-1", seeds), Loss(99.0, "null-2", seeds)], 10.0)["summary"]
    assert summary["replies whose engine was killed"] == 3
    assert (summary["pause, s, max"], summary["pause, s, p50"]) == (1.5, 1.0)
    assert summary["whole, engine killed: s beyond its work, max"] == 8.0  # 20 tokens take one second
    assert summary["refused, lost, broken or wrong"] == 0


def test_figures_that_miss_what_is_promised() -> None:
    kept = {"at once, stream: engines killed by it": 3, "pause, s, p95": 2.0, "pause, s, max": 9.0, "/ready was 503": 0}
    assert missed(kept) == []
    assert missed({"at once, stream: engines killed by it": 4, "lost, broken or wrong": 1, "lost": 1}) == [
        "at once, stream: engines killed by it: 4",
        "lost, broken or wrong: 1",
    ]
    assert missed({"a stopped engine was found, s": None}) == ["a stopped engine was found, s: None"]


def test_the_command_writes_its_figures_and_fails_where_it_missed_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scene(say: Any, logs: Path, **options: Any) -> dict[str, Any]:
        return {"options": options, "summary": {"engines killed by it": options["innocents"]}, "broken": []}

    monkeypatch.setattr("benchmarks.crowds.SCENES", {"poison": (scene, ("innocents",))})
    words = ["--output", str(tmp_path / "crowds.json"), "--engines", "4", "--scene", "poison", "--innocents"]
    assert CliRunner().invoke(main, [*words, "3"]).exit_code == 0
    assert CliRunner().invoke(main, [*words, "9"]).exit_code == 1
    found = json.loads((tmp_path / "crowds.json").read_text())["scenarios"]["poison"]
    assert found["options"] == {"innocents": 9, "engines": 4, "queue": "gateway"}
    assert found["missed"] == ["engines killed by it: 9"]
