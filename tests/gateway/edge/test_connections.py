"""Who gets a connection, who gives way, and who is refused, over thousands of real sockets."""

import contextlib
import resource
import socket
import time
from collections.abc import Iterator

import pytest
import uvloop

from synthia_vllm.errors import LimitExceeded
from synthia_vllm.gateway.edge.connections import Connections, connections_of
from synthia_vllm.settings import AccessSettings
from tests.gateway.edge.echo import Echo
from tests.gateway.live import serving

ASKED = b"GET /a HTTP/1.1\r\nhost: x\r\n\r\n"
WAITING = b"GET /wait HTTP/1.1\r\nhost: x\r\n\r\n"
HALF = b"POST /half HTTP/1.1\r\nhost: x\r\n"
HALF_BODY = b"POST /half HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\nabc"


class Clients:
    """Real sockets, each from an address of this machine; all are closed in the end."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.all: list[socket.socket] = []

    def open(self, sent: bytes = b"", count: int = 1, address: str = "127.0.0.1") -> list[socket.socket]:
        made = []
        for _ in range(count):
            found = socket.create_connection(("127.0.0.1", self.port), 5, source_address=(address, 0))
            self.all.append(found)
            made.append(found)
            if sent:
                found.sendall(sent)
        return made

    def ask(self, address: str = "127.0.0.1", count: int = 1) -> list[bytes]:
        """The beginnings of the replies, over new connections that stay open."""
        return [answer_of(one) for one in self.open(ASKED, count, address)]


def answer_of(connection: socket.socket) -> bytes:
    connection.settimeout(5)
    try:
        return connection.recv(65536)
    except ConnectionResetError:
        return b""


def is_open(connection: socket.socket) -> bool:
    connection.settimeout(0)
    try:
        while connection.recv(65536):
            pass
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


@contextlib.contextmanager
def clients_of(app: Echo, **access: object) -> Iterator[Clients]:
    with serving(
        app, loop_factory=uvloop.new_event_loop, access=AccessSettings.model_validate({"mode": "keys", **access})
    ) as port:
        clients = Clients(port)
        try:
            yield clients
        finally:
            for one in clients.all:
                one.close()


@pytest.fixture(scope="module", autouse=True)
def _many_files() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before[1], before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("half", [b"", HALF, HALF_BODY], ids=["silent", "half headers", "half a body"])
def test_thousands_of_half_sent_requests_keep_nobody_out(half: bytes) -> None:
    with clients_of(Echo(), max_connections=1000) as clients:
        (running,) = clients.open(WAITING)
        for _ in range(5):
            clients.open(half, 600)
            assert all(reply.startswith(b"HTTP/1.1 200") for reply in clients.ask(count=20))
        assert is_open(running)
        assert sum(map(is_open, clients.all)) <= 1000


def test_idle_connections_are_closed_first_the_longest_idle_before_all() -> None:
    with clients_of(Echo(), max_connections=1000) as clients:
        half = clients.open(HALF, 400)
        idle = clients.open(ASKED, 600)
        assert all(answer_of(one).startswith(b"HTTP/1.1 200") for one in idle)
        assert len(clients.ask(count=200)) == 200
        assert not any(map(is_open, idle[:200]))
        assert all(map(is_open, idle[200:]))
        assert all(map(is_open, half))


def test_whole_requests_are_never_cut_for_a_newcomer_who_is_told_to_come_back() -> None:
    with clients_of(Echo(), max_connections=50) as clients:
        running = clients.open(WAITING, 50)
        time.sleep(0.3)
        (told,) = clients.ask()
        assert told.startswith(b"HTTP/1.1 503")
        assert b"\r\nretry-after: 1\r\n" in told
        assert b'"code":"overloaded"' in told
        assert all(map(is_open, running))
        running[0].close()
        time.sleep(0.2)
        assert clients.ask()[0].startswith(b"HTTP/1.1 200")


def test_one_address_has_its_number_and_the_others_theirs() -> None:
    with clients_of(Echo(), max_connections_per_address=300) as clients:
        running = clients.open(WAITING, 300, "127.0.0.2")
        time.sleep(0.3)
        (told,) = clients.ask("127.0.0.2")
        assert told.startswith(b"HTTP/1.1 429")
        assert b"300 connections per address" in told
        assert all(reply.startswith(b"HTTP/1.1 200") for reply in clients.ask("127.0.0.3", 50))
        assert all(map(is_open, running))


def test_an_address_at_its_number_loses_its_own_half_sent_ones() -> None:
    with clients_of(Echo(), max_connections_per_address=200) as clients:
        others = clients.open(HALF, 10, "127.0.0.3")
        own = clients.open(HALF, 200, "127.0.0.2")
        for _ in range(20):
            assert clients.ask("127.0.0.2")[0].startswith(b"HTTP/1.1 200")
        assert [is_open(one) for one in own].count(False) == 1  # then its own idle ones gave way
        assert all(map(is_open, others))


def test_this_machines_own_address_is_a_proxys_and_stands_for_many() -> None:
    with clients_of(Echo(), max_connections_per_address=20) as clients:
        clients.open(WAITING, 100)
        assert clients.ask()[0].startswith(b"HTTP/1.1 200")


def test_a_proxys_clients_are_told_apart_by_what_it_says_and_nobody_else_is_believed() -> None:
    def asks(path: bytes, forwarded: bytes) -> bytes:
        return b"GET %b HTTP/1.1\r\nhost: x\r\nx-forwarded-for: %b\r\n\r\n" % (path, forwarded)

    proxies = ["127.0.0.0/30", "10.0.0.0/8"]
    with clients_of(Echo(), max_connections_per_address=30, proxies=proxies) as clients:
        clients.open(asks(b"/wait", b"203.0.113.7"), 15)
        clients.open(asks(b"/wait", b"198.51.100.1, 203.0.113.7, 10.1.2.3"), 15, "127.0.0.2")
        time.sleep(0.3)
        (crowd,) = clients.open(asks(b"/a", b"203.0.113.7"))
        assert answer_of(crowd).startswith(b"HTTP/1.1 429")
        (another,) = clients.open(asks(b"/a", b"203.0.113.8"))
        assert answer_of(another).startswith(b"HTTP/1.1 200")
        (nameless,) = clients.open(asks(b"/a", b"nonsense"))
        assert answer_of(nameless).startswith(b"HTTP/1.1 200")
        # Not a proxy: whatever it claims, it is itself.
        claims = [asks(b"/wait", b"203.0.113.%d" % number) for number in range(100, 131)]
        lying = [clients.open(claim, 1, "127.0.0.9")[0] for claim in claims]
        assert answer_of(lying[-1]).startswith(b"HTTP/1.1 429")


def test_what_was_counted_is_forgotten_when_all_have_left() -> None:
    places = Connections(most=3, most_per_address=2)

    class Quiet:
        def give_way(self) -> None:
            raise AssertionError

    made = [Quiet() for _ in range(3)]
    assert places.enter(made[0], "192.0.2.1") is None
    assert places.enter(made[1], "::ffff:192.0.2.1") is None
    for one in made[:2]:
        places.busy(one)
    assert isinstance(places.enter(made[2], "192.0.2.1"), LimitExceeded)
    for one in made:
        places.gone(one)
        places.gone(one)
    assert places.enter(made[2], "192.0.2.1") is None
    places.gone(made[2])
    assert not any(vars(places)[name] for name in ("_clients", "_of", "_lingering"))


def test_a_network_of_ipv6_is_one_client() -> None:
    places = Connections(most=10, most_per_address=10)
    assert places.client("2001:db8::1") == places.client("2001:db8::ffff:2") != places.client("2001:db8:0:1::1")
    assert places.client("::1") == places.client(None) == ""


def test_there_are_no_more_connections_than_files(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = [(1024, 20000)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, wanted: limits.append(wanted))
    assert connections_of(AccessSettings(max_connections=10000)).most == 10000
    assert limits[-1] == (12560, 20000)
    limits.append((1024, 8192))
    assert connections_of(AccessSettings(max_connections=10000)).most == 8192 - 2560
    assert limits[-1] == (8192, 8192)


def test_those_who_are_refused_hold_no_sockets() -> None:
    with clients_of(Echo(), max_connections=10) as clients:
        running = clients.open(WAITING, 10)
        time.sleep(0.3)
        refused = clients.open(b"", 1000)
        time.sleep(2.5)  # longer than the few that may read why are given
        assert not any(map(is_open, refused))
        assert all(map(is_open, running))
