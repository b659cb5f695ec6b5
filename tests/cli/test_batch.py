import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from synthia_vllm.cli.batch import finished, read_requests, run_requests
from synthia_vllm.errors import SetupError


def request(custom_id: str, **body: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with what it was asked; 400 where that says so."""
    body = await Request(scope, receive).json()
    await JSONResponse({"got": body}, 400 if body.get("bad") else 200)(scope, receive, send)


async def test_results_are_openais_lines_and_failures_are_counted(tmp_path: Path) -> None:
    target = tmp_path / "out.jsonl"
    todo = [request("a"), request("b", bad=True), request("c", model="own")]
    failed = await run_requests(echo, todo, target, "demo", 2, Console(file=io.StringIO()))
    lines = {line["custom_id"]: line for line in map(json.loads, target.read_text().splitlines())}
    assert failed == 1
    assert lines["a"]["response"]["body"] == {"got": {"model": "demo"}}
    assert lines["c"]["response"]["body"] == {"got": {"model": "own"}}
    assert lines["b"]["response"]["status_code"] == 400
    assert finished(target) == {"a", "b", "c"}


def test_a_cut_last_line_is_done_again(tmp_path: Path) -> None:
    target = tmp_path / "out.jsonl"
    target.write_text('{"custom_id": "a"}\n{"custom_id": "b", "resp')
    assert finished(target) == {"a"}
    assert target.read_text() == '{"custom_id": "a"}\n'


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '{"custom_id": 5}',
        json.dumps(request("a") | {"url": "/v1/models"}),
        json.dumps(request("a", stream=True)),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(f"{json.dumps(request('x'))}\n{line}\n")
    with pytest.raises(SetupError, match="line 2"):
        read_requests(source)


def test_an_id_may_come_once(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(f"{json.dumps(request('x'))}\n" * 2)
    with pytest.raises(SetupError, match="'x'"):
        read_requests(source)


def test_another_kind_of_file_is_not_written_to(tmp_path: Path) -> None:
    target = tmp_path / "notes.txt"
    target.write_text("notes\n")
    with pytest.raises(SetupError, match=r"notes\.txt"):
        finished(target)
