"""How many connections there may be, of all clients and of each address, and who gives way when there are too many."""

import resource
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Sequence
from functools import lru_cache
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address
from time import monotonic
from typing import Protocol

import structlog
from starlette.types import ASGIApp, Receive, Scope, Send

from synthia_vllm.errors import LimitExceeded, Overloaded, RequestError
from synthia_vllm.gateway.edge.replies import refuse
from synthia_vllm.settings import LOOPBACK, AccessSettings

Networks = Sequence[IPv4Network | IPv6Network]

_OTHER_FILES = 2560  # beside clients' connections: those being accepted, to engines, databases, logs
_MOST_LINGERING = 256  # connections that were refused and may still read why
_IPV6_SITE = 64  # bits that tell one network of IPv6 from another
_TOLD_EACH_S = 10.0

_log = structlog.get_logger(__name__)


class Connection(Protocol):
    def give_way(self) -> None:
        """Ends, since others need its place: it has no request that is whole."""


class Connections:
    """Lets clients in, and has those go that hold a place for nothing.

    At a limit the longest idle connection gives way, else the one that has been longest without a whole request; a
    request that is whole is never cut. The newcomer is refused only where there is none of either. Connections of this
    machine itself and of `proxies` stand for many clients: they count in the total alone.
    """

    def __init__(self, *, most: int, most_per_address: int, proxies: Networks = ()) -> None:
        self.most = most
        self.most_per_address = most_per_address
        self.proxies = proxies
        self.refused = 0
        self.displaced = 0
        self._clients: dict[Connection, str] = {}  # those that are open, and whose they are
        self._of: Counter[str] = Counter()  # connections, and requests through proxies, by client
        self._idle = _Spare()  # between two requests
        self._partial = _Spare()  # without a whole request yet
        self._lingering: set[Connection] = set()
        self._told_at = float("-inf")

    def enter(self, connection: Connection, address: str | None) -> RequestError | None:
        """Counts a connection that has come; gives what refuses it. `leave` must follow, whatever it gives."""
        client = self.client(address)
        if client and self._of[client] >= self.most_per_address and not self._displace(client):
            return self._refuse(_too_many(self.most_per_address), client)
        if len(self._clients) >= self.most and not self._displace():
            return self._refuse(Overloaded("all connections are taken", 1.0), client)
        self._clients[connection] = client
        self._of[client] += 1
        self._partial.add(connection, client)
        return None

    def leave(self, connection: Connection) -> None:
        """It holds no place any more; may be told twice."""
        self.busy(connection)
        if (client := self._clients.pop(connection, None)) is not None:
            self.exit(client)

    def idle(self, connection: Connection) -> None:
        """It has had its replies, and nothing more has come."""
        if (client := self._clients.get(connection)) is not None:
            self._partial.remove(connection, client)
            self._idle.add(connection, client)

    def partial(self, connection: Connection) -> None:
        """A part of a request has come."""
        if (client := self._clients.get(connection)) is not None:
            self._idle.remove(connection, client)
            self._partial.add(connection, client)

    def busy(self, connection: Connection) -> None:
        """A whole request is being answered."""
        if (client := self._clients.get(connection)) is not None:
            self._idle.remove(connection, client)
            self._partial.remove(connection, client)

    def may_linger(self, connection: Connection) -> bool:
        """Whether one that is at its end may stay until its client has read why; `gone` must follow."""
        if len(self._lingering) >= _MOST_LINGERING:
            return False
        self._lingering.add(connection)
        return True

    def gone(self, connection: Connection) -> None:
        """Its socket is closed."""
        self.leave(connection)
        self._lingering.discard(connection)

    def begin(self, client: str) -> RequestError | None:
        """Counts a client's request that came through a proxy, or refuses it; `exit` must follow what is counted."""
        if self._of[client] >= self.most_per_address:
            self.refused += 1
            return _too_many(self.most_per_address)
        self._of[client] += 1
        return None

    def exit(self, client: str) -> None:
        self._of[client] -= 1
        if not self._of[client]:
            del self._of[client]

    def client(self, address: str | None) -> str:
        """Whose an address is; empty where it stands for many, as this machine's own and a proxy's do."""
        return "" if address is None or address in LOOPBACK or self._is_proxy(address) else _site(address)

    def forwarded(self, scope: Scope) -> str:
        """Whose a request is that came through a proxy: the last address that no proxy of ours has; empty for none."""
        peer = scope.get("client")
        if peer is None or not self._is_proxy(peer[0]):
            return ""
        lines = [value.decode("latin-1") for name, value in scope["headers"] if name == b"x-forwarded-for"]
        for address in reversed(",".join(lines).split(",")):
            site = _site(address.strip())
            if not site:
                return ""
            if not self._is_proxy(address.strip()):
                return site
        return ""

    def _is_proxy(self, address: str) -> bool:
        return bool(self.proxies) and _within(address, tuple(self.proxies))

    def _displace(self, client: str | None = None) -> bool:
        for spare in (self._idle, self._partial):
            if (found := spare.oldest(client)) is not None:
                self.leave(found)
                self.displaced += 1
                found.give_way()
                return True
        return False

    def _refuse(self, error: RequestError, client: str) -> RequestError:
        self.refused += 1
        if monotonic() - self._told_at >= _TOLD_EACH_S:
            self._told_at = monotonic()
            _log.warning("connections_refused", reason=error.reason, client=client, of_all=self.refused)
        return error


class _Spare:
    """Connections in the order in which they became so, of all clients and of each."""

    def __init__(self) -> None:
        # A dict that is emptied from its front takes ever longer to tell what is there.
        self._all: OrderedDict[Connection, None] = OrderedDict()
        self._of: defaultdict[str, OrderedDict[Connection, None]] = defaultdict(OrderedDict)

    def add(self, connection: Connection, client: str) -> None:
        """One that is there keeps its place."""
        if connection not in self._all:
            self._all[connection] = self._of[client][connection] = None

    def remove(self, connection: Connection, client: str) -> None:
        if connection in self._all:
            del self._all[connection], self._of[client][connection]
            if not self._of[client]:
                del self._of[client]

    def oldest(self, client: str | None) -> Connection | None:
        return next(iter(self._all if client is None else self._of.get(client, ())), None)


class ForwardedClients:
    """Counts the requests of each client that come through proxies, as `Connections` says. A pure ASGI layer."""

    def __init__(self, app: ASGIApp, connections: Connections) -> None:
        self.app = app
        self.connections = connections

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        client = self.connections.forwarded(scope) if scope["type"] == "http" else ""
        if not client:
            return await self.app(scope, receive, send)
        if (error := self.connections.begin(client)) is not None:
            return await refuse(error, scope, send)
        try:
            await self.app(scope, receive, send)
        finally:
            self.connections.exit(client)


def connections_of(settings: AccessSettings) -> Connections:
    """The limits as set, or as many as this process may have files open, which is raised as far as it goes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = settings.max_connections + _OTHER_FILES
    most = settings.max_connections
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = max(soft // 2, soft - _OTHER_FILES)
        _log.warning("few_files", open_files=soft, max_connections=most, cure="raise the limit of open files")
    return Connections(
        most=most, most_per_address=settings.max_connections_per_address, proxies=tuple(settings.proxies)
    )


def _too_many(most: int) -> RequestError:
    return LimitExceeded("connections_per_address", most, 1.0)


@lru_cache(4096)
def _site(address: str) -> str:
    """An IPv4 address, or the network that an IPv6 one is in; empty for what is none."""
    try:
        found = ip_address(address)
    except ValueError:
        return ""
    if not isinstance(found, IPv6Address):
        return str(found)
    if found.ipv4_mapped is not None:
        return str(found.ipv4_mapped)
    return str(IPv6Network((found, _IPV6_SITE), strict=False))


@lru_cache(4096)
def _within(address: str, networks: tuple[IPv4Network | IPv6Network, ...]) -> bool:
    try:
        found = ip_address(address)
    except ValueError:
        return False
    if isinstance(found, IPv6Address) and found.ipv4_mapped is not None:
        found = found.ipv4_mapped
    return any(found in network for network in networks)
