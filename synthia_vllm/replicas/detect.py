"""What kind of engine answers at a URL."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import aiohttp
import msgspec

from synthia_vllm.api import abort
from synthia_vllm.prompt import Style, render
from synthia_vllm.replicas.http import BUSY, refusal

# generate: takes token ids at `/inference/v1/generate`; completions: takes text, or ids, at `/v1/completions`.
Kind = Literal["generate", "completions"]

GENERATE, COMPLETIONS, MODELS = "/inference/v1/generate", "/v1/completions", "/v1/models"
TOKENIZE = "/tokenize"  # vLLM's, and ours
_PROBE_S = 5.0
_PROBE = [{"role": "user", "content": "a"}]
_VLLM = ("vllm", "synthia-vllm")  # `owned_by` of vLLM's models, and of a gateway's of ours


@dataclass(slots=True)
class Endpoint:
    """Where an engine answers, and what is known of it."""

    url: str  # the routes are under it
    kind: Kind | None = None  # None: not found out yet
    models: list[str] = field(default_factory=list)  # its names, the first one is its own
    root: str | None = None  # the model's folder or its id on the hub
    context: int | None = None  # most tokens of prompt and reply
    vllm: bool = False  # takes vLLM's parameters, and tells token ids
    aborts: bool = False  # tells what a request came to when it is asked to end it
    bos: str = ""  # what a conversation's text needs in front: empty where BOS comes by itself, or nobody tells

    @property
    def tells_ids(self) -> bool:
        return self.kind == "generate" or self.vllm

    def model(self, asked: str) -> str:
        """The name to ask it with: the client's where the engine knows it too."""
        return asked if asked in self.models or not self.models else self.models[0]


async def detect(
    endpoint: Endpoint, session: aiohttp.ClientSession, headers: Mapping[str, str], *, tokens: bool
) -> None:
    """Finds out what an engine is, without having it generate. `tokens`: whether its token ids are of use here.

    Raises aiohttp's errors, TimeoutError, and EngineRefused where it is in no state to tell.
    """
    timeout = aiohttp.ClientTimeout(_PROBE_S)
    async with session.get(endpoint.url + MODELS, headers=headers, timeout=timeout) as reply:
        cards = model_cards(await reply.read()) if reply.status == 200 else []
    endpoint.models = [card["id"] for card in cards]
    card = cards[0] if cards else {}
    root, context = card.get("root"), card.get("max_model_len")
    endpoint.root = root if isinstance(root, str) else None
    endpoint.context = context if isinstance(context, int) else None
    endpoint.vllm = card.get("owned_by") in _VLLM
    if endpoint.vllm:
        # As below. Who names the missing field knows the route.
        async with session.post(endpoint.url + abort.PATH, json={}, headers=headers, timeout=timeout) as reply:
            endpoint.aborts = reply.status == 400 and b"request_id" in await reply.content.read(1024)
    if not tokens:
        endpoint.bos = await _missing_bos(endpoint, session, headers)
        endpoint.kind = "completions"
        return
    # A request without a field: whoever has the route says so, whoever has not says that.
    async with session.post(endpoint.url + GENERATE, json={}, headers=headers, timeout=timeout) as reply:
        said = await reply.content.read(1024)
        if reply.status in (401, 403) or (reply.status >= 500 and reply.status != 501):
            raise refusal(reply.status, said)
        kind: Kind = "generate" if reply.status in (400, 422) else "completions"
    endpoint.vllm = endpoint.vllm or kind == "generate"
    if not endpoint.vllm:
        endpoint.bos = await _missing_bos(endpoint, session, headers)
    endpoint.kind = kind


class _Tokens(msgspec.Struct):
    tokens: list[int] = []
    token_strs: list[str] | None = None


async def _missing_bos(endpoint: Endpoint, session: aiohttp.ClientSession, headers: Mapping[str, str]) -> str:
    """The text that makes a conversation's prompt, sent as text, the tokens that the engine's own chat makes of it.

    Empty where none is missing. Where the engine has no chat in the format of ours, or no `/tokenize`, nobody knows.
    """

    async def tokens(**asked: Any) -> _Tokens:
        body = {**asked, "model": endpoint.models[0]} if endpoint.models else asked
        timeout = aiohttp.ClientTimeout(_PROBE_S)
        async with session.post(endpoint.url + TOKENIZE, json=body, headers=headers, timeout=timeout) as reply:
            said = await reply.read()
            if reply.status in BUSY:
                raise refusal(reply.status, said)
            if reply.status != 200:
                return _Tokens()
            try:
                return msgspec.json.decode(said, type=_Tokens)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                return _Tokens()

    chat = await tokens(messages=_PROBE, return_token_strs=True)
    if not chat.tokens:
        return ""
    styles: tuple[Style, ...] = get_args(Style)
    for text in (render(_PROBE, style=style) for style in styles):
        first: list[str] = (chat.token_strs or [])[:1]
        for bos in ("", *first):
            if (await tokens(prompt=bos + text)).tokens == chat.tokens:
                return bos
    return ""


def least_context(endpoints: Iterable[Endpoint]) -> int | None:
    """The most tokens that every engine which told takes."""
    return min((one.context for one in endpoints if one.context is not None), default=None)


def model_cards(body: bytes) -> list[dict[str, Any]]:
    """The entries of an engine's `/v1/models` that have a name; none of what is no such list."""
    try:
        found = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return []
    cards = found.get("data") if isinstance(found, dict) else None
    if not isinstance(cards, list):
        return []
    return [card for card in cards if isinstance(card, dict) and isinstance(card.get("id"), str)]
