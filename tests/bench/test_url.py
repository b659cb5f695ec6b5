"""`bench url`: any server, also one that takes less than vLLM does, or that answers nothing."""

import csv
import json
import os
import subprocess
import sys
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
    ("engine", "words"),
    [
        pytest.param(NullEngine, ("--price-per-hour", "3.6"), id="vllm"),
        pytest.param(lambda: Foreign(refuses=OPTIONAL), ("--completions",), id="strict"),
        pytest.param(lambda: Foreign(overlooks=("ignore_eos",), reply_tokens=5), (), id="overlooks"),
    ],
)
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


class Noting(NullEngine):
    """Keeps what it was asked."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.bodies: list[dict[str, Any]] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def heard() -> Any:
            message = await receive()
            if message.get("body"):
                self.bodies.append(json.loads(message["body"]))
            return message

        await super().__call__(scope, heard, send)

    def sent(self) -> list[tuple[str, int]]:
        """Prompt and length of each request but the probe's."""
        return [
            (body.get("prompt") or body["messages"][-1]["content"], body["max_tokens"])
            for body in self.bodies
            if "one word yes" not in json.dumps(body)
        ]


DATASET = [
    {"conversations": [{"from": "human", "value": f"question {n}"}, {"from": "gpt", "value": "four" * n}]}
    for n in range(1, 30)
]


def test_a_file_decides_what_is_asked_and_how_long_replies_are(tmp_path: Path) -> None:
    (tmp_path / "chats.json").write_text(json.dumps(DATASET))
    engines = [Noting(), Noting()]
    for engine in engines:
        done = run(engine, tmp_path, "--dataset", str(tmp_path / "chats.json"), "--most-tokens", "25")
        assert done.exit_code == 0, done.output
    assert "22 prompts, 7 longer ones left out" in done.output
    first, second = (engine.sent() for engine in engines)
    assert {(prompt, int(prompt.split()[1])) for prompt, _ in first} == set(first)
    assert [prompt for prompt, _ in first] != [f"question {n + 1}" for n in range(len(first))]
    # One stream's requests follow each other, so that the order can be told; the warm-up's can be too.
    assert sorted(first[:8]) == sorted(second[:8])
    assert read(tmp_path / "run.json").options["dataset"] == str(tmp_path / "chats.json")


@pytest.mark.parametrize("words", [(), ("--completions",)])
def test_prompts_share_as_many_beginnings_as_asked_for(words: tuple[str, ...], tmp_path: Path) -> None:
    engine = Noting()
    shared = ("--shared-prefix-tokens", "20", "--prefixes", "2", "--prompt-tokens", "30", "--output-tokens", "8:3")
    done = run(engine, tmp_path, *shared, *words)
    assert done.exit_code == 0, done.output
    prompts = [prompt.split() for prompt, _ in engine.sent()]
    assert {len(prompt) for prompt in prompts} == {30}
    assert len({tuple(prompt[:20]) for prompt in prompts}) == 2
    assert len({tuple(prompt[20:]) for prompt in prompts}) == len(prompts)
    assert len({length for _, length in engine.sent()}) > 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--prompt-tokens", "512:"), "512:128 (mean and deviation) is wanted"),
        (
            ("--prompt-tokens", "20", "--shared-prefix-tokens", "20"),
            "fewer are wanted; or give more of --prompt-tokens",
        ),
        (("--dataset", "FILE", "--prompt-tokens", "20"), "leave one of them out"),
        (("--dataset", "FILE", "--most-tokens", "3"), "all 29 entries of"),
    ],
)
def test_options_that_contradict_each_other_are_refused_with_the_cure(
    words: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    (tmp_path / "chats.json").write_text(json.dumps(DATASET))
    given = [str(tmp_path / "chats.json") if word == "FILE" else word for word in words]
    done = CliRunner().invoke(command, ["http://127.0.0.1:1", *given])
    assert done.exit_code == 2
    assert said in " ".join(done.output.replace("│", " ").split())


def test_a_warm_up_that_fails_ends_it_with_the_servers_words(tmp_path: Path) -> None:
    class Small(Foreign):
        """Answers the probe, and nothing longer."""

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "http" and scope["method"] == "POST":
                body = await _whole(receive)
                if json.loads(body)["max_tokens"] > 40:
                    said = json.dumps({"error": {"message": "maximum context length is 40 tokens"}}).encode()
                    await send({"type": "http.response.start", "status": 400, "headers": []})
                    await send({"type": "http.response.body", "body": said})
                    return

                async def again() -> Any:
                    return {"type": "http.request", "body": body, "more_body": False}

                await super().__call__(scope, again, send)
                return
            await super().__call__(scope, receive, send)

    done = run(Small(), tmp_path)
    assert done.exit_code == 1
    assert "answered none of 8 requests: http 400" in done.output
    assert "maximum context length is 40 tokens" in done.output
    assert list(tmp_path.iterdir()) == []


def test_it_needs_neither_the_engine_nor_the_gateway_nor_numba(tmp_path: Path) -> None:
    """As in an installation of synthia-vllm[bench] for which `bench url` is all."""
    ours = [f"synthia_vllm.{name}" for name in ("cluster", "gateway", "prompt", "replicas", "settings")]
    theirs = ["fastapi", "numba", "ray", "starlette", "torch", "transformers", "uvicorn", "vllm"]
    # In its client processes, too.
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({ours + theirs}))\n")
    with serving(NullEngine()) as port:
        words = [f"http://127.0.0.1:{port}", "--seconds", "1", "--most-streams", "2", "--output", "run.json"]
        done = subprocess.run(
            [sys.executable, "-c", "from synthia_vllm.bench.url import command; command()", *words],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2]}"},
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert "Load benchmark" in (tmp_path / "run.html").read_text()


def test_no_server_is_one_line(tmp_path: Path) -> None:
    done = CliRunner().invoke(command, ["http://127.0.0.1:1"])
    assert done.exit_code == 1
    assert done.output.startswith("Error: no answer from http://127.0.0.1:1/v1/models")


@pytest.mark.parametrize(("most", "steps"), [(1, [1]), (2, [1, 2]), (5, [1, 2, 4, 5]), (8, [1, 2, 4, 8])])
def test_streams_double_up_to_the_most(most: int, steps: list[int]) -> None:
    assert list(doubled(most)) == steps
