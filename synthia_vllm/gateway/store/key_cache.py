"""Keys in memory, so that a request pays microseconds for its look-up, and a revoked key is out within two seconds."""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable

import structlog
from sqlalchemy.exc import SQLAlchemyError

from synthia_vllm.errors import Overloaded
from synthia_vllm.gateway.accounts import Account
from synthia_vllm.gateway.store.keys import KeyStore, well_formed
from synthia_vllm.gateway.store.threads import DaemonThreads

_POLL_S = 1.0
_MOST = 10_000  # known and unknown keys that are remembered
BLIND_S = 60.0  # without its database, or its watch, a gateway goes on for so long with the keys that it knows

_log = structlog.get_logger(__name__)


class KeyCache:
    """Looks keys up by their digest: known and unknown ones alike cost one HMAC and one look into a dictionary.

    Raises Overloaded (503) where the database must be asked and does not answer within so many seconds.
    """

    def __init__(self, store: KeyStore, *, answer_s: float = 3.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._answer_s = answer_s
        self._clock = clock
        self._known: OrderedDict[str, Account | None] = OrderedDict()
        self._revision: int | None = None
        self._seen = clock()  # when the watch last had an answer of the database
        self._pool = DaemonThreads(4, "keys")
        self._watcher = DaemonThreads(1, "keys-watch")  # a flood of look-ups can't hold it up

    @property
    def blind(self) -> bool:
        """No revocation has been looked for in so long that no known key is believed."""
        return self._clock() - self._seen > BLIND_S

    async def lookup(self, presented: str) -> Account | None:
        """The account that a key opens; None for a key that is malformed, unknown, revoked or expired."""
        if not well_formed(presented):
            return None
        digest = self._store.digest(presented)
        if self.blind:
            self._known.clear()
        if digest in self._known:
            self._known.move_to_end(digest)
            account = self._known[digest]
        else:
            account = await self._ask(digest, presented)
        if account is not None and account.expires is not None and account.expires <= time.time():
            return None
        return account

    async def watch(self) -> None:
        """Forgets everything when the revision moves. Runs until it is cancelled; needs to be supervised."""
        while True:
            await self._poll()
            await asyncio.sleep(_POLL_S)

    def close(self) -> None:
        for pool in (self._pool, self._watcher):
            pool.shutdown()

    async def _ask(self, digest: str, presented: str) -> Account | None:
        revision = self._revision
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._answer_s):
                account = await loop.run_in_executor(self._pool, self._store.find, presented)
        except (SQLAlchemyError, TimeoutError, RuntimeError):  # a RuntimeError: no thread can be started
            raise Overloaded("keys can't be looked up now", 5.0) from None
        if revision == self._revision and not self.blind:  # else it may be known in a state that is gone
            self._known[digest] = account
            if len(self._known) > _MOST:
                self._known.popitem(last=False)
        return account

    async def _poll(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._answer_s):
                revision = await loop.run_in_executor(self._watcher, self._store.revision)
        except (SQLAlchemyError, TimeoutError) as error:
            if self._revision is not None:
                _log.error("key_database_lost", error=str(error).partition("\n")[0] or "no answer")
                self._revision = None
            return
        if revision != self._revision:
            self._known.clear()
            self._revision = revision
        self._seen = self._clock()
