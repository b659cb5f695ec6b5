"""Which server is asked: one that runs, or one started for it."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from synthia_vllm.errors import SetupError

_START_TIMEOUT_S = 1800.0  # the weights of a large model take their time
_STOP_TIMEOUT_S = 90.0
_TAIL = 2000  # characters of a log


@dataclass(frozen=True)
class Endpoint:
    """A server and what it serves. `tokenizer` is a folder or hub id; `max_length` is its context in tokens."""

    url: str
    model: str
    tokenizer: str
    max_length: int
    key: str = "none"


def find_endpoint(url: str, *, model: str | None, tokenizer: str | None, key: str) -> Endpoint:
    """Asks the server for its model, its context and where its tokenizer is. Raises SetupError."""
    url = url.rstrip("/").removesuffix("/v1")
    try:
        reply = httpx.get(f"{url}/v1/models", headers={"Authorization": f"Bearer {key}"}, timeout=30)
        if reply.status_code in (401, 403):
            raise SetupError(f"--url {url} wants a key: --api-key, or SYNTHIA_API_KEY")
        listed = reply.raise_for_status().json()["data"]
        named = [entry for entry in listed if model in (None, entry["id"])]
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError, TypeError) as error:
        raise SetupError(f"--url {url}: no answer from {url}/v1/models: {error!r}; is a server running?") from None
    if not named:
        raise SetupError(f"--served-model {model}: the server has {', '.join(entry['id'] for entry in listed)}")
    entry: dict[str, Any] = named[0]
    where = tokenizer or entry.get("root")
    if not where:
        raise SetupError(f"{url} does not tell where its model is: give --tokenizer FOLDER or hub id")
    if str(where).startswith("/") and not Path(where).is_dir():
        raise SetupError(f"the server's model is in {where}, which is not on this machine: give --tokenizer FOLDER")
    if not entry.get("max_model_len"):
        raise SetupError(f"{url} does not tell its context (max_model_len): is it a vLLM server?")
    return Endpoint(url, entry["id"], str(where), int(entry["max_model_len"]), key)


@contextmanager
def started(model: str | None, words: Sequence[str], log: Path) -> Iterator[str]:
    """The URL of a `synthia-vllm serve` of this machine, while it is needed. Raises SetupError with its last words."""
    command = [sys.executable, "-m", "synthia_vllm", "serve", "--port", "0", "--log-file", str(log.with_suffix(".log"))]
    command += ["--no-page", *(["--model", model] if model else []), *words]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as stream:
        # A group, so that Ctrl-C is for us alone; no session: Linux' autogroups would make us wait for busy workers.
        process = subprocess.Popen(command, stdout=stream, stderr=stream, process_group=0)
    try:
        yield _wait(process, log)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while not (found := re.search(r"at (http://\S+)", log.read_text())):
        if process.poll() is not None or time.monotonic() > deadline:
            raise SetupError(f"the server did not start:\n{log.read_text()[-_TAIL:]}")
        time.sleep(0.2)
    return found.group(1)
