"""Users, their limits and their bill, on the real engine."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from synthia_vllm.bench.keys import make_key
from synthia_vllm.free_ports import free_port
from tests.conftest import RunningServer
from tests.e2e.test_server import of_vllm, running
from tests.running import until

pytestmark = pytest.mark.e2e

ORCA: list[Any] = [{"role": "user", "content": "What is an orca?"}]
NewKey = Callable[..., str]


def synthia(data: Path, *words: str) -> str:
    command = [sys.executable, "-m", "synthia_vllm", *words]
    environment = {**os.environ, "SYNTHIA_DATA": str(data)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def new_key(server: RunningServer) -> NewKey:
    return lambda user, *options: make_key(user, *options, data=server.data)


def bill(server: RunningServer, user: str, requests: int = 1) -> dict[str, int]:
    """The user's line of `usage`, once the ledger has it."""

    def line() -> dict[str, int] | None:
        rows = json.loads(synthia(server.data, "usage", "--user", user, "--format", "json"))
        return rows[0] if rows and rows[0]["requests"] + rows[0]["refused"] >= requests else None

    found: dict[str, int] = until(line, f"{requests} requests of {user} are on the bill")
    return found


def test_the_bill_is_the_engines_own_count(server: RunningServer, client: httpx.Client, new_key: NewKey) -> None:
    headers = {"Authorization": f"Bearer {new_key('exact')}"}
    body = {"model": "synthia", "messages": ORCA, "max_tokens": 12}
    usage = [client.post("/v1/chat/completions", json=body, headers=headers).json()["usage"]]
    options = {"stream": True, "stream_options": {"include_usage": True}}
    text = client.post("/v1/chat/completions", json={**body, **options}, headers=headers).text
    usage.append(json.loads(text.split("\n\n")[-3].removeprefix("data: "))["usage"])
    text = client.post(
        "/v1/completions", json={"model": "synthia", "prompt": "A", "n": 3, "max_tokens": 5, **options}, headers=headers
    ).text
    usage.append(json.loads(text.split("\n\n")[-3].removeprefix("data: "))["usage"])
    reply = client.post("/v1/messages", json=body, headers=headers).json()["usage"]
    prompt = reply["input_tokens"] + reply["cache_read_input_tokens"]  # Anthropic tells them apart
    usage.append({"prompt_tokens": prompt, "completion_tokens": reply["output_tokens"]})
    body = {"model": "synthia", "input": "What is an orca?", "max_output_tokens": 9, "stream": True}
    text = client.post("/v1/responses", json=body, headers=headers).text
    reply = json.loads(text.strip().split("\n\n")[-1].partition("data: ")[2])["response"]["usage"]
    usage.append({"prompt_tokens": reply["input_tokens"], "completion_tokens": reply["output_tokens"]})
    billed = bill(server, "exact", 5)
    assert billed["requests"] == 5
    assert billed["prompt_tokens"] == sum(one["prompt_tokens"] for one in usage)
    assert billed["generated_tokens"] == sum(one["completion_tokens"] for one in usage)


def test_a_stream_that_is_cut_is_billed_for_what_was_generated(
    server: RunningServer, client: httpx.Client, new_key: NewKey
) -> None:
    headers = {"Authorization": f"Bearer {new_key('cut')}"}
    until(lambda: running(client) == 0, "what other tests left has ended")
    before = of_vllm(client, "generation_tokens_total")
    body = {"model": "synthia", "prompt": "A", "max_tokens": 4000, "ignore_eos": True, "stream": True}
    seen = 0
    with client.stream("POST", "/v1/completions", json=body, headers=headers) as reply:
        for line in reply.iter_lines():
            seen += line.startswith("data: {")
            if seen == 10:
                break
    billed = bill(server, "cut")
    until(lambda: running(client) == 0, "the engine has ended it")
    assert billed["prompt_tokens"] == 1
    assert 10 <= billed["generated_tokens"] == of_vllm(client, "generation_tokens_total") - before
    assert billed["generated_tokens"] < 4000  # a slow machine notices late that its client has gone


def test_the_live_view_tells_of_users_and_the_engines_own_capacity(client: httpx.Client, new_key: NewKey) -> None:
    admin = {"x-api-key": new_key("ops", "--admin")}
    headers = {"x-api-key": new_key("busy", "--concurrent-requests", "4")}
    body = {"model": "synthia", "prompt": "A", "max_tokens": 4000, "ignore_eos": True, "stream": True}
    with client.stream("POST", "/v1/completions", json=body, headers=headers) as reply:
        lines = reply.iter_lines()  # kept: httpx closes the stream when it goes
        next(lines)
        state = client.get("/admin/state", headers=admin).json()
    assert state["capacity_tokens"] > 4096
    assert state["capacity_requests"] > 1
    assert state["users"]["busy"]["in_flight"] == 1
    assert state["users"]["busy"]["used"]["concurrent_requests"] == 1
    assert state["users"]["busy"]["limits"]["concurrent_requests"] == 4


def test_a_limit_is_an_error_that_the_official_client_knows(server: RunningServer, new_key: NewKey) -> None:
    key = new_key("limited", "--requests-per-minute", "1")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)
    client.chat.completions.create(model="synthia", messages=ORCA, max_tokens=1)
    with pytest.raises(openai.RateLimitError) as caught:
        client.chat.completions.create(model="synthia", messages=ORCA, max_tokens=1)
    assert 1 <= int(caught.value.response.headers["retry-after"]) <= 60


def test_keys_over_http_and_a_revoked_one_is_out_within_two_seconds(client: httpx.Client, new_key: NewKey) -> None:
    admin = {"x-api-key": new_key("root", "--admin")}
    made = client.post("/admin/keys", json={"user": "viahttp", "weight": 2, "admin": True}, headers=admin)
    assert made.status_code == 201
    key = made.json()
    assert client.get("/admin/state", headers={"x-api-key": key["key"]}).status_code == 200
    rotated = client.post(f"/admin/keys/{key['id']}/rotate", json={"grace_s": 0}, headers=admin).json()
    assert client.get("/admin/state", headers={"x-api-key": rotated["key"]}).status_code == 200
    assert client.delete(f"/admin/keys/{rotated['id']}", headers=admin).status_code == 204
    time.sleep(2)
    for one in (key, rotated):
        assert client.get("/admin/state", headers={"x-api-key": one["key"]}).status_code == 401
    listed = client.get("/admin/keys", headers=admin).json()
    assert {row["id"] for row in listed if row["revoked"]} >= {key["id"], rotated["id"]}
    assert "viahttp" in {row["name"] for row in client.get("/admin/users", headers=admin).json()}
    assert client.delete("/admin/keys/nothere", headers=admin).status_code == 404
    wrong = client.post("/admin/keys", json={"user": "a b"}, headers=admin)
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "user")
    much = client.post("/admin/keys", json={"user": "viahttp", "tokens_per_minute": 10**30}, headers=admin)
    assert (much.status_code, much.json()["error"]["param"]) == (400, "tokens_per_minute")
    assert isinstance(client.get("/admin/usage?by=day", headers=admin).json(), list)


def test_nothing_said_and_no_key_is_in_the_log(server: RunningServer, client: httpx.Client, new_key: NewKey) -> None:
    key = new_key("private")
    secret = "the walrus was Paul 7281"
    body = {"model": "synthia", "messages": [{"role": "user", "content": secret}], "max_tokens": 5}
    reply = client.post("/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {key}"})
    # The line is written when the reply has gone out.
    until(lambda: reply.headers["x-request-id"] in server.log.read_text(errors="replace"), "it is in the log")
    log = server.log.read_text(errors="replace")
    assert secret not in log
    assert key[20:] not in log


@pytest.fixture
def gateway(server: RunningServer, tmp_path: Path) -> Iterator[str]:
    """`synthia-vllm gateway` in front of the shared server, with keys of its own."""
    port = free_port()
    command = [sys.executable, "-m", "synthia_vllm", "gateway", "--port", str(port), "--upstream", server.url]
    process = subprocess.Popen(
        [*command, "--access.mode", "keys"],
        env={**os.environ, "SYNTHIA_DATA": str(tmp_path)},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    assert any("Ready" in line for line in process.stderr)  # the log comes first
    yield f"http://127.0.0.1:{port}"
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0


def test_the_gateway_in_front_of_an_engine(gateway: str, tmp_path: Path) -> None:
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{gateway}/v1", api_key="sk-synthia-none").models.list()
    key = synthia(tmp_path, "keys", "create", "--user", "alice")
    client = openai.OpenAI(base_url=f"{gateway}/v1", api_key=key, max_retries=0)
    text = ""
    for chunk in client.chat.completions.create(
        model="synthia", messages=ORCA, max_tokens=20, temperature=0, stream=True
    ):
        assert chunk.usage is None
        text += chunk.choices[0].delta.content or ""
    assert text == text.strip() != ""
    rows = until(lambda: json.loads(synthia(tmp_path, "usage", "--format", "json")), "it is on the bill")
    assert rows[0]["user"] == "alice"
    assert 0 < rows[0]["generated_tokens"] <= 20
