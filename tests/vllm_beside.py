"""`synthia-vllm serve` with vLLM's own routes beside ours, over the same engine: what ours are compared with.

    python -m tests.vllm_beside FILE [serve's options]

writes the URL of vLLM's routes to FILE when they answer.
"""

import asyncio
import contextlib
import socket
import sys
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import uvicorn

from synthia_vllm.cli.serve import serve
from synthia_vllm.engine.private_vllm import find
from synthia_vllm.engine.server import tokenizer_of
from synthia_vllm.settings import load_settings


def vllms_routes(file: Path) -> Any:
    """A companion of the server that serves vLLM's own app."""

    @contextlib.asynccontextmanager
    async def beside(llm: Any, args: Any) -> AsyncGenerator[None, None]:
        tasks = await llm.get_supported_tasks()
        args.default_chat_template_kwargs = {"bos_lead": (await tokenizer_of(llm)).lead}
        app = find("build_app")(args, tasks, llm.model_config)
        await find("init_app_state")(llm, app.state, args, tasks)
        sock = socket.socket()
        sock.bind(("127.0.0.1", 0))
        server = _Quiet(uvicorn.Config(app, log_config=None, lifespan="off"))
        task = asyncio.create_task(server.serve(sockets=[sock]))
        await asyncio.to_thread(file.write_text, f"http://127.0.0.1:{sock.getsockname()[1]}")
        try:
            yield
        finally:
            server.should_exit = server.force_exit = True
            await task

    return beside


class _Quiet(uvicorn.Server):
    """Leaves the signals to the server beside it."""

    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        yield


if __name__ == "__main__":
    # Engine processes are spawned and import this module: only the first one serves.
    sys.exit(serve(load_settings(sys.argv[2:]), [], vllms_routes(Path(sys.argv[1]))))
