"""Whether what is kept beside the requests is kept: keys that end, and the bill."""

from collections.abc import Awaitable, Callable

from synthia_vllm.errors import Overloaded
from synthia_vllm.gateway.store.key_cache import BLIND_S, KeyCache
from synthia_vllm.gateway.store.ledger import Ledger

UNBILLED_S = 300.0
_AGAIN_S = 5.0


class StoresReady:
    """Is as ready as the engine, unless revocations were not looked for, or rows not written, for too long.

    Raises Overloaded (503) with the reason then. `keys` is None where none are needed.
    """

    def __init__(self, ready: Callable[[], Awaitable[bool]], *, keys: KeyCache | None, ledger: Ledger) -> None:
        self._ready = ready
        self._keys = keys
        self._ledger = ledger

    async def __call__(self) -> bool:
        if self._keys is not None and self._keys.blind:
            raise Overloaded(f"keys could not be checked against the database for {BLIND_S:.0f} s", _AGAIN_S)
        if self._ledger.unwritten_s > UNBILLED_S:
            raise Overloaded(f"the ledger could not be written for {UNBILLED_S:.0f} s", _AGAIN_S)
        return await self._ready()
