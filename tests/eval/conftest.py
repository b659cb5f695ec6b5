"""A stand-in for a server, a tokenizer of bytes, and data in the hub's layout."""

import hashlib
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from benchmarks.eval_data import stand_ins
from synthia_vllm.eval.server import Endpoint
from synthia_vllm.free_ports import free_port
from tests.running import until

DATA = Path(__file__).with_name("data")
MODEL = "stand-in"


@dataclass
class StandIn:
    """A completions server without a model: a token's log-probability follows from the ids up to it, and nothing else.

    `interrupt_at`: at that request the process gets a Ctrl-C.
    """

    tokenizer: Path
    port: int = field(default_factory=free_port)
    prompts: list[list[int]] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    interrupt_at: int | None = None
    status: int = 200

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint(self.url, MODEL, str(self.tokenizer), 65536)

    def app(self) -> Starlette:
        async def completions(request: Request) -> Response:
            body = await request.json()
            self.bodies.append(body)
            self.prompts += body["prompt"]
            if len(self.prompts) == self.interrupt_at:
                os.kill(os.getpid(), signal.SIGINT)
            if self.status != 200:
                return JSONResponse({"error": {"message": "not today"}}, self.status)
            choices = [
                {"index": at, "text": "", "logprobs": logprobs([*ids, 0])} for at, ids in enumerate(body["prompt"])
            ]
            return JSONResponse({"choices": choices})

        async def models(_: Request) -> Response:
            entry = {"id": MODEL, "root": str(self.tokenizer), "max_model_len": 65536}
            return JSONResponse({"data": [entry]})

        return Starlette(routes=[Route("/v1/completions", completions, methods=["POST"]), Route("/v1/models", models)])


def logprobs(ids: list[int]) -> dict[str, Any]:
    digest, found = hashlib.sha256(), []
    for token in ids:
        digest.update(token.to_bytes(4, "big"))
        found.append(math.log((digest.digest()[0] + 1) / 257))
    return {"token_logprobs": [None, *found[1:]], "top_logprobs": [None, *({"x": value} for value in found[1:])]}


@pytest.fixture(scope="session")
def byte_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Path]:
    """A folder with a tokenizer whose tokens are bytes; with BOS it begins every text with one, as Llama's do."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    def make(bos: bool) -> Path:
        words = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
        tokenizer = Tokenizer(models.BPE(vocab={word: at for at, word in enumerate(words)}, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        if bos:
            tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        folder = tmp_path_factory.mktemp("tokenizer")
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def stand_in(byte_tokenizer: Callable[[bool], Path]) -> Iterator[StandIn]:
    found = StandIn(byte_tokenizer(True))
    server = uvicorn.Server(uvicorn.Config(found.app(), port=found.port, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server.started, "the stand-in answers")
    yield found
    server.should_exit = True
    thread.join(10)


@pytest.fixture(scope="session")
def all_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stand-in data with all of MMLU's subjects: each has the questions of one of the three that were written."""
    return stand_ins(tmp_path_factory.mktemp("data"))
