"""The replies that are under way, by the names that their users gave them."""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

from synthia_vllm.errors import RequestNotFound
from synthia_vllm.gateway.delivery import ClientLeft, Delivery
from synthia_vllm.gateway.request import Exchange

_MOST_LEFT = 1024


class UnderWay:
    """Ends a user's request by its X-Request-Id, and knows what the last ones that were left came to.

    A client's leaving may be noticed before its word of it is read.
    """

    def __init__(self) -> None:
        self._running: dict[tuple[str, str], Delivery] = {}
        self._left: OrderedDict[tuple[str, str], int] = OrderedDict()  # tokens

    @contextmanager
    def running(self, exchange: Exchange, delivery: Delivery) -> Iterator[None]:
        """For as long as it is delivered. Of two of one name the later one has it."""
        name = exchange.account.user, exchange.request_id
        self._running[name] = delivery
        try:
            yield
        except ClientLeft:
            self._left[name] = exchange.usage.generated
            while len(self._left) > _MOST_LEFT:
                self._left.popitem(last=False)
            raise
        finally:
            if self._running.get(name) is delivery:
                del self._running[name]

    async def abort(self, user: str, request_id: str) -> int:
        """Ends it, and tells the tokens that it generated. Raises RequestNotFound."""
        name = user, request_id
        if (delivery := self._running.get(name)) is not None:
            return await delivery.abort()
        if name not in self._left:
            raise RequestNotFound(request_id)
        return self._left[name]
