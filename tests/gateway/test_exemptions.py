"""Every row of docs/apis.md about what is refused or left out, sent as it stands there."""

import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from synthia_vllm.bench.null.port import NullEnginePort
from synthia_vllm.gateway.app import without_users
from synthia_vllm.settings import Settings

PAGE = Path(__file__).parents[2] / "docs" / "apis.md"
ROW = re.compile(r"^\| `(/v1/\S+)` \| `(\{.*\})` \| (\d+)(?: `(\S+)`)? \|", re.MULTILINE)
ROWS = ROW.findall(PAGE.read_text(encoding="utf-8"))
LEAST: dict[str, Any] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}]},
    "/v1/completions": {"prompt": "Hi"},
    "/v1/responses": {"input": "Hi"},
    "/v1/messages": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4},
}


@pytest.mark.parametrize(("route", "fields", "status", "param"), ROWS)
async def test_the_page_of_the_apis_says_what_happens(route: str, fields: str, status: str, param: str) -> None:
    app = without_users(NullEnginePort(reply_tokens=3), Settings())
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        reply = await client.post(route, json={**LEAST[route], **json.loads(fields)})
    assert reply.status_code == int(status), reply.text
    if param:
        error = reply.json()["error"]
        assert param in f"{error.get('param')} {error['message']}"


def test_no_row_of_the_page_is_passed_over() -> None:
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `/v1/")]
    assert len(rows) == len(ROWS) > 15
