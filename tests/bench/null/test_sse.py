"""Streams as other servers write them: the same to who reads by the standard, or plainly wrong."""

import json
from typing import Any

import httpx
import pytest

from synthia_vllm.bench.null.engine import NullEngine
from synthia_vllm.bench.null.faults import Faults, SseForm

BODY: dict[str, Any] = {"model": "null", "prompt": "What is an orca?", "max_tokens": 3, "stream": True}
BODY["stream_options"] = {"include_usage": True}


async def stream(form: SseForm | None) -> httpx.Response:
    engine = NullEngine(numbered=True, faults=Faults(sse=form))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=engine), base_url="http://null") as client:
        return await client.post("/v1/completions", json=BODY)


def read(text: str) -> list[str]:
    """The data of each event, by WHATWG HTML 9.2.6."""
    lines = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n").split("\n")
    events, data = [], []
    for line in lines:
        if line.startswith("data:"):
            data.append(line[5:].removeprefix(" "))
        elif not line and data:
            events.append("\n".join(data))
            data = []
    return events


def texts(events: list[str]) -> list[str]:
    assert events[-1] == "[DONE]"
    return [choice["text"] for event in events[:-1] for choice in json.loads(event)["choices"] or ()]


@pytest.mark.parametrize("form", ["crlf", "ids", "split", "null_choices"])
async def test_by_the_standard_it_says_the_same(form: SseForm) -> None:
    plain, other = await stream(None), await stream(form)
    assert other.content != plain.content
    assert texts(read(other.text)) == texts(read(plain.text))
    assert len(texts(read(plain.text))) == 3


async def test_each_form_has_what_it_is_named_for() -> None:
    assert b"\n" not in (await stream("crlf")).content.replace(b"\r\n", b"")
    lines = (await stream("ids")).text.split("\n")
    assert {"id: 7", "event: message", ": keep-alive", "retry: 3000"} <= set(lines)
    assert any(line.startswith('data:{"') for line in lines)
    assert '\ndata: "choices"' in (await stream("split")).text
    assert [json.loads(event)["choices"] for event in read((await stream("null_choices")).text)[:-1]].count(None) == 2


async def test_a_page_is_status_200() -> None:
    reply = await stream("html")
    assert (reply.status_code, reply.headers["content-type"]) == (200, "text/html; charset=utf-8")


async def test_no_other_form_is_known() -> None:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=NullEngine()), base_url="http://null") as client:
        assert (await client.post("/fault", json={"sse": "xml"})).status_code == 400
        assert (await client.post("/fault", json={"sse": "crlf"})).json()["faults"]["sse"] == "crlf"
