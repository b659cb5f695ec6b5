"""The names that engines answer to."""

import asyncio
from collections.abc import Callable, Mapping, Sequence

import aiohttp

from synthia_vllm.errors import UpstreamLost
from synthia_vllm.replicas.detect import MODELS, Endpoint, model_cards
from synthia_vllm.supervise import spawn

_FRESH_S = 5.0
_TIMEOUT_S = 5.0
_PATIENCE_S = 1.0  # with engines that hang, where names are known


class ModelList:
    """Asks engines for their models, all of them at once; an answer holds for some seconds.

    Every request needs the names: those who come together ask once, and an engine that hangs holds up nobody who could
    do with the names of before.
    """

    def __init__(
        self,
        headers: Mapping[str, str],
        session: Callable[[], aiohttp.ClientSession],
        *,
        names: Sequence[str] = (),
        keep: bool = False,
    ) -> None:
        """`names` are known from elsewhere; with `keep`, what is known once holds while no engine can be asked."""
        self._headers = headers
        self._session = session
        self._keep = keep
        self._known = list(names)
        self._fresh_until = float("-inf")
        self._asking: asyncio.Task[None] | None = None

    async def of(self, endpoints: Sequence[Endpoint]) -> list[str]:
        """All their names, each once. Raises UpstreamLost where none of them tells any."""
        if asyncio.get_running_loop().time() >= self._fresh_until:
            if self._asking is None or self._asking.done():
                self._asking = spawn("models", self._ask_all(list(endpoints)))
            if not (self._known and self._keep):
                await asyncio.wait((self._asking,), timeout=_PATIENCE_S if self._known else None)
        if not self._known:
            raise UpstreamLost("no engine tells its models")
        return self._known

    async def close(self) -> None:
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.gather(self._asking, return_exceptions=True)

    async def _ask_all(self, endpoints: Sequence[Endpoint]) -> None:
        answers = await asyncio.gather(*map(self._ask, endpoints))
        names = list(dict.fromkeys(name for answer in answers for name in answer))
        if names or not self._keep:
            self._known = names
        if names:
            self._fresh_until = asyncio.get_running_loop().time() + _FRESH_S

    async def _ask(self, endpoint: Endpoint) -> list[str]:
        """None of an engine that can't be asked, or whose list can't be read."""
        timeout = aiohttp.ClientTimeout(_TIMEOUT_S)
        try:
            async with self._session().get(endpoint.url + MODELS, headers=self._headers, timeout=timeout) as reply:
                cards = model_cards(await reply.read()) if reply.status == 200 else []
        except (aiohttp.ClientError, TimeoutError):
            return []
        if cards:
            endpoint.models = [card["id"] for card in cards]
        return [card["id"] for card in cards]
