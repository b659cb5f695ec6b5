"""Clients that take nothing of their replies, against a whole gateway over real sockets."""

import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvloop

from synthia_vllm.bench.null.port import NullEnginePort
from synthia_vllm.engine.port import Capacity
from synthia_vllm.gateway.app import Gateway
from synthia_vllm.settings import TimeoutSettings
from tests.gateway.live import serving
from tests.gateway.whole import House, house_settings

PLACES = 4
WRITE_S = 1.0


@contextmanager
def open_house(folder: Path, engine: NullEnginePort) -> Iterator[tuple[House, int]]:
    """A gateway before an engine of four places, with its port."""
    gateway = Gateway(engine, house_settings(folder), capacity=Capacity(requests=PLACES))
    found = House(gateway, engine)
    for user in ("mallory", "alice"):
        found.let_in(user)
    limits = TimeoutSettings(write=WRITE_S)
    with serving(gateway.app, beside=gateway, loop_factory=uvloop.new_event_loop, timeouts=limits) as port:
        yield found, port


def ask(port: int, key: str, **fields: Any) -> socket.socket:
    """Sends a request with all the logprobs that there are, from a client whose own buffer is small."""
    content = json.dumps({"model": "synthia", "prompt": "Hello", "logprobs": 5, **fields}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nx-api-key: {key}\r\ncontent-length: {len(content)}\r\n\r\n"
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(20)
    connection.connect(("127.0.0.1", port))
    connection.sendall(head.encode() + content)
    return connection


def until(holds: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def read_all(connection: socket.socket) -> bytes:
    found = b""
    try:
        while part := connection.recv(2**20):
            found += part
    except ConnectionResetError:
        pass
    connection.close()
    return found


@pytest.mark.parametrize(("stream", "tokens"), [(True, 10_000), (False, 30_000)])  # more than the kernel takes
def test_four_who_do_not_read_hold_no_place_in_an_engine_of_four(tmp_path: Path, stream: bool, tokens: int) -> None:
    engine = NullEnginePort(max_num_seqs=PLACES, context=None)
    with open_house(tmp_path, engine) as (house, port):
        unread = [ask(port, house.keys["mallory"], stream=stream, max_tokens=tokens) for _ in range(PLACES)]
        until(lambda: engine.generated == PLACES * tokens)
        until(house.at_rest)
        got = ask(port, house.keys["alice"], max_tokens=5)
        assert b"200 OK" in got.recv(65536)
        got.close()
        time.sleep(2 * WRITE_S)  # they are cut meanwhile
        for one in unread:
            found = read_all(one)
            assert found.startswith(b"HTTP/1.1 200")
            assert not found.rstrip().endswith((b"data: [DONE]", b"}", b"\r\n0"))
        assert [row.generated_tokens for row in house.bill("mallory")] == [tokens] * PLACES


def test_who_takes_nothing_of_a_running_stream_is_cut_and_billed_for_what_was_generated(tmp_path: Path) -> None:
    engine = NullEnginePort(tokens_per_second=1000, context=None)
    with open_house(tmp_path, engine) as (house, port):
        unread = ask(port, house.keys["mallory"], stream=True, max_tokens=1_000_000)
        until(lambda: engine.aborted == 1)
        until(house.at_rest)
        read_all(unread)
        (row,) = house.bill("mallory")
        assert row.outcome == "cancelled"
        assert 0 < row.generated_tokens == engine.generated < 1_000_000
