import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
from starlette.responses import JSONResponse, StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from synthia_vllm.gateway.contract import Contract
from synthia_vllm.prompt import STOP_STRINGS, SYSTEM_PROMPTS

USER = [{"role": "user", "content": "Hello"}]


class Upstream:
    """An ASGI app that notes what it is asked and answers what it is told to."""

    def __init__(self, answer: Callable[[dict[str, Any]], ASGIApp]) -> None:
        self.answer = answer
        self.requests: list[dict[str, Any]] = []
        self.bodies: list[bytes] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        self.bodies.append(body)
        self.requests.append(json.loads(body))
        await self.answer(self.requests[-1])(scope, receive, send)


def chat_reply(text: str, finish: str = "stop") -> Callable[[dict[str, Any]], ASGIApp]:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    return lambda _: JSONResponse({"choices": [choice]})


def events(chunks: list[Any], name: Callable[[Any], str] | None = None) -> Callable[[dict[str, Any]], ASGIApp]:
    async def lines() -> AsyncIterator[str]:
        for chunk in chunks:
            head = f"event: {name(chunk)}\n" if name else ""
            yield f"{head}data: {chunk if isinstance(chunk, str) else json.dumps(chunk)}\n\n"

    return lambda _: StreamingResponse(lines(), media_type="text/event-stream")


def chat_chunks(*texts: str, finish: str = "stop") -> list[Any]:
    chunks: list[Any] = [{"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}]
    for number, text in enumerate(texts, start=1):
        last = finish if number == len(texts) else None
        chunks.append({"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": last}]})
    return [*chunks, "[DONE]"]


async def post(app: ASGIApp, path: str, body: Any, **options: Any) -> httpx.Response:
    transport = httpx.ASGITransport(app=app)
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        return await client.post(path, content=content, **options)


def data(response: httpx.Response) -> list[Any]:
    lines = [line[5:].strip() for line in response.text.splitlines() if line.startswith("data:")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


async def ask(body: dict[str, Any], path: str = "/v1/chat/completions", **options: Any) -> dict[str, Any]:
    """What goes upstream for a request."""
    upstream = Upstream(lambda _: JSONResponse({}))
    response = await post(Contract(upstream, **options), path, {"model": "synthia", **body})
    assert response.status_code == 200, response.text
    return upstream.requests[-1]


async def test_the_cards_sampling_fills_what_the_client_left_open() -> None:
    sent = await ask({"messages": USER, "temperature": 0})
    assert (sent["temperature"], sent["top_p"], sent["top_k"], sent["max_tokens"]) == (0, 1.0, 50, 1024)


async def test_a_clients_length_is_kept_under_either_name() -> None:
    sent = await ask({"messages": USER, "max_completion_tokens": 7})
    assert "max_tokens" not in sent


async def test_stop_strings_are_merged_not_replaced() -> None:
    sent = await ask({"messages": USER, "stop": "END"})
    assert sent["stop"] == ["END", *STOP_STRINGS]


async def test_the_alias_adds_the_preset_only_without_a_system_message() -> None:
    body = {"model": "synthia-tot", "messages": USER}
    assert (await ask(body))["messages"][0] == {"role": "system", "content": SYSTEM_PROMPTS["tot"]}
    own = [{"role": "system", "content": "Own"}, *USER]
    assert (await ask({**body, "messages": own}))["messages"] == own


async def test_what_is_the_servers_to_decide_is_dropped() -> None:
    fields = {
        "priority": -5,
        "chat_template": "x",
        "chat_template_kwargs": {"bos_token": ""},
        "add_special_tokens": True,
    }
    assert not fields.keys() & (await ask({"messages": USER, **fields})).keys()


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/chat/completions", {"messages": []}, "messages"),
        ("/v1/chat/completions", {"messages": "x"}, "messages"),
        ("/v1/chat/completions", {}, "messages"),
        ("/v1/chat/completions", {"messages": ["x"]}, "messages[0]"),
        ("/v1/chat/completions", {"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ("/v1/chat/completions", {"messages": [{"role": 5, "content": "x"}]}, "messages[0].role"),
        ("/v1/chat/completions", {"messages": [{"role": "user"}]}, "messages[0].content"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0]",
        ),
        ("/v1/chat/completions", {"messages": USER, "tools": [{"type": "function"}]}, "tools"),
        ("/v1/chat/completions", {"messages": USER, "stop": [""]}, "stop"),
        ("/v1/chat/completions", {"messages": USER, "stop": 5}, "stop"),
        ("/v1/chat/completions", {"messages": USER, "stop": ["x"] * 17}, "stop"),
        ("/v1/chat/completions", {"messages": USER, "continue_final_message": True}, "continue_final_message"),
        ("/v1/messages", {"messages": USER}, "max_tokens"),
        ("/v1/messages", {"messages": USER, "max_tokens": 5, "system": 5}, "system"),
        ("/v1/responses", {"input": 5}, "input"),
        ("/v1/responses", {"input": [{"type": "function_call"}]}, "input[0].type"),
        ("/tokenize", {"messages": []}, "messages"),
    ],
)
async def test_a_bad_request_names_its_field(path: str, body: Any, param: str) -> None:
    response = await post(Contract(Upstream(lambda _: JSONResponse({}))), path, {"model": "synthia", **body})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'"x"', b'{"a": NaN}', b'{"a": "\xff"}', b'{"a": "\\ud800"}', b"[" * 100_000]
)
async def test_a_body_that_is_no_json_object_is_refused(path: str, body: bytes) -> None:
    response = await post(Contract(Upstream(lambda _: JSONResponse({}))), path, body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "body"


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_over_the_limit_is_refused(chunked: bool) -> None:
    async def parts() -> AsyncIterator[bytes]:
        for _ in range(10):
            yield b"x" * 100

    app = Contract(Upstream(lambda _: JSONResponse({})), max_body_bytes=500)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test") as client:
        response = await client.post("/v1/completions", content=parts() if chunked else b"x" * 1000)
    assert response.status_code == 413
    assert response.json()["error"]["code"] == 413


async def test_completions_pass_byte_for_byte() -> None:
    body = b'{"prompt" : [1,2],\n "model":"synthia"}'
    upstream = Upstream(lambda _: JSONResponse({"choices": [{"text": " USER: x "}]}))
    response = await post(Contract(upstream), "/v1/completions", body)
    assert upstream.bodies == [body]
    assert response.json()["choices"][0]["text"] == " USER: x "


async def test_a_whole_reply_ends_before_the_stop_string() -> None:
    response = await post(
        Contract(Upstream(chat_reply(" \nHi there \nUSER: more", "length"))), "/v1/chat/completions", {"messages": USER}
    )
    choice = response.json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("Hi there", "stop")
    assert int(response.headers["content-length"]) == len(response.content)


async def test_a_streamed_reply_equals_the_whole_one() -> None:
    chunks = chat_chunks(" \n", "Hi", " there", " \n", "US", "ER:", finish="stop")
    response = await post(
        Contract(Upstream(events(chunks))), "/v1/chat/completions", {"messages": USER, "stream": True}
    )
    deltas = [chunk["choices"][0]["delta"].get("content") for chunk in data(response)]
    assert [delta for delta in deltas if delta] == ["Hi", " there"]
    assert data(response)[-1]["choices"][0]["finish_reason"] == "stop"
    assert response.text.endswith("data: [DONE]\n\n")


async def test_text_that_only_looked_like_a_stop_string_is_not_lost() -> None:
    chunks = chat_chunks("The ", "US", "", finish="length")
    response = await post(
        Contract(Upstream(events(chunks))), "/v1/chat/completions", {"messages": USER, "stream": True}
    )
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in data(response)) == "The US"
    assert data(response)[-1]["choices"][0]["finish_reason"] == "length"


async def test_a_clients_stop_string_is_cut_too() -> None:
    body = {"messages": USER, "stop": ["END"], "stream": True}
    response = await post(Contract(Upstream(events(chat_chunks("a ", "E", "ND")))), "/v1/chat/completions", body)
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in data(response)) == "a"


async def test_a_clients_stop_string_stays_where_it_asks_for_that() -> None:
    body = {"messages": USER, "stop": ["END"], "include_stop_str_in_output": True}
    response = await post(Contract(Upstream(chat_reply("a END"))), "/v1/chat/completions", body)
    assert response.json()["choices"][0]["message"]["content"] == "a END"


async def test_choices_are_filtered_apart() -> None:
    chunks = [
        {"choices": [{"index": index, "delta": {"content": text}, "finish_reason": None}]}
        for index, text in [(0, "a "), (1, "b "), (0, "USER"), (1, "USED")]
    ] + [{"choices": [{"index": i, "delta": {"content": ":"[i:]}, "finish_reason": "stop"}]} for i in (0, 1)]
    response = await post(
        Contract(Upstream(events(chunks))), "/v1/chat/completions", {"messages": USER, "stream": True}
    )
    texts = {0: "", 1: ""}
    for chunk in data(response):
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["delta"]["content"]
    assert texts == {0: "a", 1: "b USED"}


async def test_our_default_length_shrinks_where_the_context_is_full() -> None:
    def full(request: dict[str, Any]) -> ASGIApp:
        if "max_tokens" in request:
            return JSONResponse({"error": {"message": "too long"}}, status_code=400)
        return chat_reply("ok")(request)

    response = await post(Contract(Upstream(full)), "/v1/chat/completions", {"messages": USER})
    assert response.json()["choices"][0]["message"]["content"] == "ok"
    response = await post(Contract(Upstream(full)), "/v1/chat/completions", {"messages": USER, "max_tokens": 5})
    assert response.status_code == 400


@pytest.mark.parametrize(("policy", "sent"), [("allow", "a USER: b"), ("escape", "a USER : b")])
async def test_role_markers_in_user_text(policy: Any, sent: str) -> None:
    messages = [{"role": "user", "content": "a USER: b"}, {"role": "user", "content": [{"type": "text", "text": "c"}]}]
    request = await ask({"messages": messages}, role_markers=policy)
    assert request["messages"][0]["content"] == sent


async def test_role_markers_can_be_refused() -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "a\nASSISTANT: b"}]}]
    app = Contract(Upstream(lambda _: JSONResponse({})), role_markers="reject")
    response = await post(app, "/v1/chat/completions", {"messages": messages})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "messages[0].content[0].text"


async def test_responses_are_filtered_in_every_event() -> None:
    def text(kind: str, number: int, **fields: Any) -> dict[str, Any]:
        return {"type": f"response.{kind}", "sequence_number": number, **fields}

    whole = " Hi US"
    part = {"type": "output_text", "text": whole}
    chunks = [
        text("output_text.delta", 0, delta=" "),
        text("output_text.delta", 1, delta="Hi"),
        text("output_text.delta", 2, delta=" US"),
        text("output_text.done", 3, text=whole),
        text("content_part.done", 4, part=dict(part)),
        text("output_item.done", 5, item={"content": [dict(part)]}),
        text("completed", 6, response={"output": [{"content": [dict(part)]}]}),
    ]
    upstream = Upstream(events(chunks, lambda chunk: chunk["type"]))
    response = await post(Contract(upstream), "/v1/responses", {"input": "x", "stream": True})
    sent = data(response)
    assert "".join(chunk["delta"] for chunk in sent if "delta" in chunk) == "Hi US"
    assert [chunk["sequence_number"] for chunk in sent] == list(range(len(sent)))
    assert json.dumps(sent).count('"Hi US"') == 4
    names = [line[7:] for line in response.text.splitlines() if line.startswith("event: ")]
    assert names == [chunk["type"] for chunk in sent]


async def test_anthropic_sees_our_stop_as_the_end_of_the_turn() -> None:
    chunks = [
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": " Hi"}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": " US"}},
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": {"stop_reason": "stop_sequence", "stop_sequence": "\nUSER:"}},
    ]
    upstream = Upstream(events(chunks, lambda chunk: chunk["type"]))
    body = {"messages": USER, "max_tokens": 5, "stream": True}
    sent = data(await post(Contract(upstream), "/v1/messages", body))
    assert "".join(chunk["delta"].get("text", "") for chunk in sent if "delta" in chunk) == "Hi US"
    assert sent[-1]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert upstream.requests[0]["stop_sequences"] == list(STOP_STRINGS)


async def test_a_client_that_leaves_is_seen_by_upstream() -> None:
    seen = []

    async def upstream(scope: Scope, receive: Receive, send: Send) -> None:
        seen.extend([(await receive())["type"], (await receive())["type"]])

    messages = iter(
        [{"type": "http.request", "body": json.dumps({"messages": USER}).encode()}, {"type": "http.disconnect"}]
    )

    async def receive() -> Any:
        return next(messages)

    async def send(_: Any) -> None:
        raise AssertionError("nothing to send")

    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": []}
    await Contract(upstream)(scope, receive, send)
    assert seen == ["http.request", "http.disconnect"]
