"""The model card's own way to generate, behind just enough HTTP to be measured like the others: a peer.

    python -m synthia_vllm.bench.card_server --model FOLDER --port 8001

/single/v1/completions    the card's `model.generate`, one request at a time; the others wait
/batched/v1/completions   the same call with all that wait (64 at most) as one padded batch

Prompts are token ids, so that nobody's tokenizer is measured. `generate` does not stream: a reply comes as one chunk.
Calls and their parameters are those of the card's `generate_text`, in bfloat16 as vLLM runs the model.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import click
import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

LARGEST_BATCH = 64


@dataclass
class Job:
    """What one client waits for."""

    prompt: list[int]
    tokens: int
    sampling: dict[str, Any]
    reply: "asyncio.Future[list[int]]"


class Queue:
    """Runs jobs in order of arrival, up to `batch` at once; a batch is done before the next begins."""

    def __init__(self, model: Any, batch: int, turn: asyncio.Lock) -> None:
        self._model, self._batch, self._turn = model, batch, turn
        self._jobs: asyncio.Queue[Job] = asyncio.Queue()

    async def ask(self, prompt: list[int], tokens: int, sampling: dict[str, Any]) -> list[int]:
        job = Job(prompt, tokens, sampling, asyncio.get_running_loop().create_future())
        self._jobs.put_nowait(job)
        return await job.reply

    async def run(self) -> None:
        while True:
            jobs = [await self._jobs.get()]
            if self._batch > 1:
                await asyncio.sleep(0.01)  # those who came at once are one batch
            while len(jobs) < self._batch and not self._jobs.empty():
                jobs.append(self._jobs.get_nowait())
            jobs = [job for job in jobs if not job.reply.cancelled()]  # who left is not served
            if not jobs:
                continue
            async with self._turn:
                found = await asyncio.to_thread(self._generate, jobs)
            for job, reply in zip(jobs, found, strict=True):
                if not job.reply.cancelled():
                    job.reply.set_result(reply)

    def _generate(self, jobs: list[Job]) -> list[list[int]]:
        import torch

        length = max(len(job.prompt) for job in jobs)
        tokens = max(job.tokens for job in jobs)
        padded = torch.LongTensor([[0] * (length - len(job.prompt)) + job.prompt for job in jobs])
        mask = torch.LongTensor([[0] * (length - len(job.prompt)) + [1] * len(job.prompt) for job in jobs])
        with torch.no_grad():
            rest = self._model.generate(
                input_ids=padded.to(self._model.device),
                attention_mask=mask.to(self._model.device),
                max_length=length + tokens,
                min_new_tokens=tokens,  # what `ignore_eos` is to vLLM
                use_cache=True,
                pad_token_id=0,
                **jobs[0].sampling,
            )
        return [row[length : length + job.tokens].tolist() for row, job in zip(rest, jobs, strict=True)]


def load(folder: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device)


def application(model: Any) -> Starlette:
    """Both ways in, to one model."""
    turn = asyncio.Lock()  # both ways in have all cores while they work
    queues = {"single": Queue(model, 1, turn), "batched": Queue(model, LARGEST_BATCH, turn)}

    async def completions(request: Request) -> Response:
        body = msgspec.json.decode(await request.body())
        prompt, tokens = body["prompt"], body["max_tokens"]
        if not isinstance(prompt, list):
            return JSONResponse({"error": {"message": "prompts are token ids here"}}, 400)
        asked = asyncio.ensure_future(queues[request.path_params["way"]].ask(prompt, tokens, sampling(body)))
        left = asyncio.ensure_future(_left(request))
        try:
            await asyncio.wait((asked, left), return_when=asyncio.FIRST_COMPLETED)
            return Response(events(prompt, await asked) if asked.done() else b"", media_type="text/event-stream")
        finally:
            asked.cancel()
            left.cancel()

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        running = [asyncio.create_task(queue.run()) for queue in queues.values()]
        yield
        for task in running:
            task.cancel()

    async def health(_: Request) -> Response:
        return Response()

    routes = [
        Route("/{way:str}/v1/completions", completions, methods=["POST"]),
        Route("/health", health),
    ]
    return Starlette(routes=routes, lifespan=lifespan)


def sampling(body: dict[str, Any]) -> dict[str, Any]:
    """The card's parameters where the request asks for sampling, else greedy."""
    if not body.get("temperature"):
        return {"do_sample": False}
    names = ("temperature", "top_p", "top_k")
    return {"do_sample": True, **{name: body[name] for name in names if name in body}}


def events(prompt: list[int], reply: list[int]) -> bytes:
    usage = {"prompt_tokens": len(prompt), "completion_tokens": len(reply)}
    choice = {"index": 0, "text": "", "finish_reason": "length", "token_ids": reply}
    told = b"".join(
        b"data: " + msgspec.json.encode(part) + b"\n\n" for part in ({"choices": [choice]}, {"usage": usage})
    )
    return told + b"data: [DONE]\n\n"


async def _left(request: Request) -> None:
    while not await request.is_disconnected():
        await asyncio.sleep(0.05)


@click.command()
@click.option("--model", required=True, help="Folder or hub id.")
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=int, required=True)
def main(model: str, host: str, port: int) -> None:
    """Serve the model as the card's script runs it."""
    import uvicorn

    uvicorn.run(application(load(model)), host=host, port=port, log_level="warning")


if __name__ == "__main__":
    main()
