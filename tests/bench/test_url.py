"""`bench url`: any server, also one that takes less than vLLM does, or that answers nothing."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from starlette.types import Receive, Scope, Send

from synthia_vllm.bench.client import OPTIONAL, Target
from synthia_vllm.bench.null.engine import NullEngine
from synthia_vllm.bench.probe import ProbeError, probe
from synthia_vllm.bench.run_file import read
from synthia_vllm.bench.url import command, doubled
from tests.gateway.live import serving


class Foreign(NullEngine):
    """Refuses these fields as OpenAI's API refuses what it does not know, and overlooks those. A stand-in of faults."""

    def __init__(self, refuses: tuple[str, ...] = (), overlooks: tuple[str, ...] = (), **options: Any) -> None:
        super().__init__(**options)
        self.refuses, self.overlooks = refuses, overlooks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await super().__call__(scope, receive, send)
            return
        body = json.loads(await _whole(receive))
        if unknown := [name for name in self.refuses if name in body]:
            said = json.dumps({"error": {"message": f"Unrecognized request argument supplied: {unknown[0]}"}}).encode()
            await send({"type": "http.response.start", "status": 400, "headers": []})
            await send({"type": "http.response.body", "body": said})
            return
        kept = json.dumps({name: value for name, value in body.items() if name not in self.overlooks}).encode()
        sent = False

        async def again() -> Any:
            nonlocal sent
            if sent:
                return await receive()
            sent = True
            return {"type": "http.request", "body": kept, "more_body": False}

        headers = [(name, value) for name, value in scope["headers"] if name != b"content-length"]
        headers.append((b"content-length", str(len(kept)).encode()))
        await super().__call__({**scope, "headers": headers}, again, send)


async def _whole(receive: Receive) -> bytes:
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            return body


def run(engine: NullEngine, folder: Path, *words: str) -> Result:
    with serving(engine) as port:
        given = [f"http://127.0.0.1:{port}", "--output", str(folder / "run.json"), "--seconds", "1", *words]
        return CliRunner().invoke(command, [*given, "--most-streams", "4", "--clients", "1"], catch_exceptions=False)


@pytest.mark.parametrize("count", range(len(OPTIONAL) + 1))
@pytest.mark.parametrize("chat", [True, False])
async def test_what_a_server_does_not_take_is_left_out(count: int, chat: bool) -> None:
    with serving(Foreign(refuses=OPTIONAL[:count])) as port:
        target = Target(f"http://127.0.0.1:{port}", "null", chat=chat)
        needless = {"min_tokens"} if count == 2 and not chat else set()  # completions have none
        assert (await probe(target, chat=chat)).omit == set(OPTIONAL[:count]) - needless


async def test_a_server_that_overlooks_ignore_eos_is_not_blamed_for_short_replies() -> None:
    with serving(Foreign(overlooks=("ignore_eos", "min_tokens"), reply_tokens=3)) as port:
        found = await probe(Target(f"http://127.0.0.1:{port}", "null", chat=True), chat=True)
        assert found.omit == {"ignore_eos", "min_tokens"}


@pytest.mark.parametrize(
    "engine",
    [NullEngine, lambda: Foreign(refuses=OPTIONAL), lambda: Foreign(overlooks=("ignore_eos",), reply_tokens=5)],
    ids=["vllm", "strict", "overlooks"],
)
@pytest.mark.parametrize("words", [(), ("--completions",), ("--price-per-hour", "3.6")])
def test_it_sweeps_and_writes_all_three(
    engine: Callable[[], NullEngine], words: tuple[str, ...], tmp_path: Path
) -> None:
    done = run(engine(), tmp_path, *words)
    assert done.exit_code == 0, done.output
    rows = list(csv.DictReader((tmp_path / "run.csv").open()))
    assert rows[0]["streams"] == "1"
    assert all(float(row["output throughput, tokens/s"]) > 0 for row in rows)
    assert all(row["failed"] == "0" for row in rows)
    assert ("per 1M" in done.output) == bool(rows[0]["price of a million tokens"]) == ("3.6" in words)
    measurements = read(tmp_path / "run.json").measurements
    assert [str(found.streams) for found in measurements] == [row["streams"] for row in rows]
    assert "<html" in (tmp_path / "run.html").read_text()


def test_one_that_answers_nothing_is_told_in_its_own_words(tmp_path: Path) -> None:
    done = run(Foreign(refuses=("model",)), tmp_path)
    assert done.exit_code == 1
    assert "Unrecognized request argument supplied: model" in done.output
    assert not (tmp_path / "run.json").exists()


async def test_another_error_is_not_asked_again_with_less() -> None:
    class Down(NullEngine):
        posts = 0

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "http" and scope["method"] == "POST":
                self.posts += 1
                await send({"type": "http.response.start", "status": 503, "headers": []})
                await send({"type": "http.response.body", "body": b"model is loading"})
                return
            await super().__call__(scope, receive, send)

    engine = Down()
    with serving(engine) as port, pytest.raises(ProbeError, match="http 503: model is loading"):
        await probe(Target(f"http://127.0.0.1:{port}", "null", chat=True), chat=True)
    assert engine.posts == 1


def test_no_server_is_one_line(tmp_path: Path) -> None:
    done = CliRunner().invoke(command, ["http://127.0.0.1:1"])
    assert done.exit_code == 1
    assert done.output.startswith("Error: no answer from http://127.0.0.1:1/v1/models")


@pytest.mark.parametrize(("most", "steps"), [(1, [1]), (2, [1, 2]), (5, [1, 2, 4, 5]), (8, [1, 2, 4, 8])])
def test_streams_double_up_to_the_most(most: int, steps: list[int]) -> None:
    assert list(doubled(most)) == steps
