"""What a running server serves and takes, found by asking it: any OpenAI-compatible server can be measured."""

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import click

from synthia_vllm.bench.client import OPTIONAL, Call, Client, Patience, Target
from synthia_vllm.bench.run_file import Request

_TOKENS = 24
# A model that may stop answers this in a word or two.
_CALL = "Answer with the one word yes."
_PATIENCE = Patience(first_s=120.0, between_s=60.0)


class ProbeError(Exception):
    """The server answers no request, whatever is left out; in its own words."""


def target_of(url: str, options: Mapping[str, Any]) -> Target:
    """A server that runs, and the model it serves. Raises ClickException where it does not answer."""
    import httpx

    url = url.rstrip("/").removesuffix("/v1")
    headers = {"Authorization": f"Bearer {options['key']}"} if options["key"] else {}
    model = options["served_model"]
    try:
        if model is None:
            listed = httpx.get(f"{url}/v1/models", headers=headers, timeout=10).raise_for_status().json()
            model = listed["data"][0]["id"]
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError) as error:
        raise click.ClickException(
            f"no answer from {url}/v1/models: {error!r}; is the URL right, and does it want --key?"
        ) from error
    return Target(
        url,
        model,
        options["key"],
        chat=bool(options.get("chat")),
        keep_alive=options.get("keep_alive", True),
    )


async def probe(target: Target, *, chat: bool) -> Target:
    """The target with what it does not take in `omit`. Raises ProbeError."""
    first: Request | None = None
    for count in range(len(OPTIONAL) + 1):
        tried = replace(target, omit=frozenset(OPTIONAL[:count]))
        found = await _ask(tried, chat=chat)
        first = first or found
        if found.error is None:
            return tried
        if found.error == "short":  # taken, and not heeded
            return replace(tried, omit=tried.omit | {"ignore_eos", "min_tokens"})
        if found.status not in (400, 422):
            break
    assert first is not None
    raise ProbeError(f"{first.error}: {first.detail}" if first.detail else str(first.error))


async def _ask(target: Target, *, chat: bool) -> Request:
    messages = ({"role": "user", "content": _CALL},)
    call = Call(_TOKENS, messages=messages) if chat else Call(_TOKENS, prompt=_CALL)
    async with Client(target, patience=_PATIENCE) as client:
        return await client.send(call, start=time.perf_counter(), due_s=0.0)
