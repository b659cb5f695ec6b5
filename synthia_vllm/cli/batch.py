"""`synthia-vllm batch`: an OpenAI batch file, offline, through the same contract as the server's."""

import asyncio
import json
import os
import sys
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click
import httpx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from synthia_vllm.errors import SetupError

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")


@click.command("batch")
@click.argument("source", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("target", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--model", default=None, help="Folder, hub id or 'demo' [default: as serve].")
@click.option("--concurrency", type=click.IntRange(1, 4096), default=128, show_default=True, help="Requests at once.")
@click.option("--config", type=click.Path(exists=True, dir_okay=False), default=None, help="YAML settings, as serve.")
def command(source: Path, target: Path, model: str | None, concurrency: int, config: str | None) -> None:
    """Run the requests of SOURCE (OpenAI batch format, JSON lines) and append the results to TARGET.

    Run it again after an interruption: requests whose custom_id is in TARGET already are skipped.
    """
    from synthia_vllm.settings import load_settings

    settings = load_settings([*(["--config", config] if config else []), *(["--model", model] if model else [])])
    requests = read_requests(source)
    done = finished(target)
    todo = [request for request in requests if request["custom_id"] not in done]
    click.echo(f"{len(requests)} requests, {len(requests) - len(todo)} done before", err=True)
    if not todo:
        return
    try:
        failed = _run(todo, target, settings, concurrency)
    except KeyboardInterrupt:
        click.echo(f"stopped; what was finished is in {target}, the same command goes on from there", err=True)
        sys.exit(130)
    if failed:
        click.echo(f"{failed} of {len(todo)} requests failed; their lines in {target} say why", err=True)
        sys.exit(1)


def read_requests(source: Path) -> list[dict[str, Any]]:
    """The requests of a batch file. Raises SetupError that names the line for what is no request."""
    requests, seen = [], set()
    for number, line in enumerate(source.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{source}, line {number}"
        try:
            request = json.loads(line)
        except ValueError as error:
            raise SetupError(f"{where}: not JSON: {error}") from None
        if not isinstance(request, dict) or not isinstance(request.get("custom_id"), str):
            raise SetupError(f"{where}: a request is an object with a custom_id that is a text")
        if request["custom_id"] in seen:
            raise SetupError(f"{where}: custom_id {request['custom_id']!r} was there before")
        if request.get("url") not in URLS or request.get("method", "POST") != "POST":
            raise SetupError(f"{where}: method is POST and url one of {', '.join(URLS)}")
        if not isinstance(request.get("body"), dict) or request["body"].get("stream"):
            raise SetupError(f"{where}: body is an object, without stream")
        seen.add(request["custom_id"])
        requests.append(request)
    return requests


def finished(target: Path) -> set[str]:
    """The ids of the results that are whole. A last line that was cut by a crash is taken off the file."""
    if not target.exists():
        return set()
    data = target.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        os.truncate(target, len(whole))
    try:
        return {json.loads(line)["custom_id"] for line in whole.splitlines() if line.strip()}
    except (ValueError, KeyError, TypeError):
        raise SetupError(f"{target}: this file is no batch result; name another") from None


def _run(todo: list[dict[str, Any]], target: Path, settings: Any, concurrency: int) -> int:
    from synthia_vllm.engine.arguments import plan_engine
    from synthia_vllm.engine.demo import cache_folder
    from synthia_vllm.engine.hardware import inspect_machine
    from synthia_vllm.engine.startup import Startup, output_to

    plan = plan_engine(settings, inspect_machine())
    log = cache_folder() / "logs" / "batch.log"
    with output_to(log) as terminal:
        plan.prepare_processes()
        console = Console(file=terminal)
        startup = Startup(console, log)
        startup.start()
        try:
            return asyncio.run(_offline(todo, target, settings, plan, concurrency, startup, console))
        finally:
            startup.stop()


async def _offline(
    todo: list[dict[str, Any]], target: Path, settings: Any, plan: Any, concurrency: int, startup: Any, console: Console
) -> int:
    from synthia_vllm.engine.server import local_engine, parse_arguments, running_engine
    from synthia_vllm.gateway.app import without_users

    args = parse_arguments(plan.arguments)
    async with running_engine(args) as llm:
        app = without_users(await local_engine(llm, args), settings)
        startup.stop()
        return await run_requests(app, todo, target, plan.name, concurrency, console)


async def run_requests(
    app: Any, todo: Iterable[dict[str, Any]], target: Path, model: str, concurrency: int, console: Console
) -> int:
    """Runs requests against an ASGI app; each result is in the file as soon as it is there. Returns how many failed."""
    todo = list(todo)
    queue = iter(todo)
    failed = 0
    columns = (TextColumn("requests"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    with target.open("a", encoding="utf-8") as results, Progress(*columns, console=console) as progress:
        bar = progress.add_task("requests", total=len(todo))
        async with httpx.AsyncClient(transport=transport, base_url="http://offline", timeout=None) as client:

            async def work() -> None:
                nonlocal failed
                for request in queue:
                    body = {"model": model, **request["body"]}
                    reply = await client.post(request["url"], json=body)
                    failed += reply.status_code != 200
                    results.write(json.dumps(result_line(request["custom_id"], reply), ensure_ascii=False) + "\n")
                    results.flush()
                    progress.advance(bar)

            async with asyncio.TaskGroup() as workers:
                for _ in range(min(concurrency, len(todo))):
                    workers.create_task(work())
    return failed


def result_line(custom_id: str, reply: httpx.Response) -> dict[str, Any]:
    """One line of OpenAI's batch output."""
    try:
        body = reply.json()
    except ValueError:
        body = {"error": {"message": reply.text, "type": "server_error", "param": None, "code": reply.status_code}}
    return {
        "id": f"batch_req_{uuid.uuid4().hex}",
        "custom_id": custom_id,
        "response": {
            "status_code": reply.status_code,
            "request_id": reply.headers.get("x-request-id"),
            "body": body,
        },
        "error": None if reply.status_code == 200 else body.get("error"),
    }
