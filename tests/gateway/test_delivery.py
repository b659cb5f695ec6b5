"""A reply on its way from the engine to its client."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import pytest
from starlette.types import Message

from synthia_vllm.api.base import Counts
from synthia_vllm.bench.null.port import NullEnginePort
from synthia_vllm.engine.port import Delta, Generation
from synthia_vllm.errors import RequestError, UpstreamLost
from synthia_vllm.gateway.delivery import ClientLeft, Delivery
from synthia_vllm.gateway.meter import Meter
from synthia_vllm.gateway.request import Exchange, Layer, Observer, Request
from synthia_vllm.gateway.sequences import Sequences
from tests.gateway.layers import PlainReply, Saying, make_exchange, make_request, settle, tokens, until

UNBOUNDED = True


class Client:
    """What a client gets; it leaves and reads when it is told to."""

    def __init__(self) -> None:
        self.leaves = asyncio.Event()
        self.reads = asyncio.Event()
        self.reads.set()
        self.messages: list[Message] = []

    async def receive(self) -> Message:
        await self.leaves.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        await self.reads.wait()
        self.messages.append(message)

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.messages)

    @property
    def whole(self) -> bool:
        return bool(self.messages) and not self.messages[-1].get("more_body", False)


class Told(Observer):
    def __init__(self) -> None:
        self.sent_ones: list[tuple[int, int]] = []

    def sent(self, exchange: Exchange, chunks: int, tokens: int) -> None:
        self.sent_ones.append((chunks, tokens))


class Ahead:
    """An engine that generates while nobody takes its tokens, as vLLM does, and hands them over when it is left."""

    def __init__(self, turns: int) -> None:
        self.generated = 0
        self._turns = turns  # of the loop, a token

    async def generate(self, generation: Generation) -> AsyncGenerator[Delta, None]:
        held: list[int] = []
        ready = asyncio.Event()
        work = asyncio.create_task(self._work(held, ready))
        try:
            while True:
                await ready.wait()
                ready.clear()
                yield _taken(held)
        except asyncio.CancelledError:
            if held:
                yield _taken(held)
            raise
        finally:
            work.cancel()

    async def _work(self, held: list[int], ready: asyncio.Event) -> None:
        while True:
            for _ in range(self._turns):
                await asyncio.sleep(0)
            self.generated += 1
            held.append(self.generated)
            ready.set()


def _taken(held: list[int]) -> Delta:
    ids = tuple(held)
    held.clear()
    return Delta(ids, "a" * len(ids))


class InPieces(PlainReply):
    def end(self, counts: Counts) -> list[bytes]:
        whole = super().end(counts)
        return [whole[:3], whole[3:]]


@pytest.fixture(params=[True, False], ids=["send never waits", "send may wait"], autouse=True)
def unbounded(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both ways of sending bring the same: that of our own server, and that of Serve's."""
    monkeypatch.setattr("tests.gateway.test_delivery.UNBOUNDED", request.param)
    return bool(request.param)


def delivery(request: Request, engine: Any, observers: Sequence[Observer] = ()) -> tuple[Delivery, Exchange]:
    exchange = make_exchange(request)
    layer: Layer = Sequences(Meter(engine))
    return Delivery(exchange, request, layer, observers, unbounded=UNBOUNDED), exchange


async def deliver(engine: Any, client: Client | None = None, **asked: Any) -> tuple[Client, Delivery, Exchange]:
    client = client or Client()
    made, exchange = delivery(make_request(**asked), engine)
    await made.run(client.receive, client.send)
    return client, made, exchange


async def test_a_stream_goes_out_as_it_grows_and_ends() -> None:
    client, made, exchange = await deliver(Saying(*tokens("a", "b", "c")), prompt=7)
    assert client.messages[0]["status"] == 200
    assert dict(client.messages[0]["headers"])[b"content-type"].startswith(b"text/event-stream")
    assert client.body == b"<7|abc|3>"
    assert client.whole
    assert not made.failed
    assert exchange.first_sent is not None


async def test_a_whole_reply_goes_out_at_its_end_with_its_length() -> None:
    client, _, exchange = await deliver(Saying(*tokens("a", "b")), prompt=7, streamed=False)
    start, body = client.messages
    assert dict(start["headers"]) == {b"content-type": b"application/json", b"content-length": b"8"}
    assert body["body"] == b"<7|ab|2>"
    assert exchange.usage.generated == 2


async def test_a_long_whole_reply_goes_out_in_its_pieces_with_its_length() -> None:
    client = Client()
    request = make_request(streamed=False)
    request.prepared.reply = InPieces(streamed=False)
    made, _ = delivery(request, Saying(*tokens("a", "b")))
    await made.run(client.receive, client.send)
    head, *bodies = client.messages
    assert [message["body"] for message in bodies] == [b"<1|", b"ab|2>"]
    assert [message.get("more_body", False) for message in bodies] == [True, False]
    assert (b"content-length", b"8") in head["headers"]


@pytest.mark.parametrize("streamed", [True, False])
async def test_what_refuses_a_request_has_a_status_of_its_own(streamed: bool) -> None:
    client = Client()
    with pytest.raises(RequestError, match="no"):
        await deliver(Saying(RequestError("no")), client, streamed=streamed)
    assert client.messages == []


async def test_an_engine_that_breaks_in_a_stream_is_told_in_it() -> None:
    client, made, exchange = await deliver(Saying(*tokens("a", "b")[:1], UpstreamLost("gone")))
    assert client.body == b"<1|a!gone!"
    assert client.whole
    assert made.failed
    assert exchange.reason == "upstream_lost"
    assert (exchange.usage.billed_generated, exchange.usage.completed) == (1, False)


async def test_a_mistake_of_ours_in_a_stream_tells_the_client_nothing_of_it() -> None:
    client, made, exchange = await deliver(Saying(*tokens("a", "b")[:1], OSError("secret")))
    assert client.body == b"<1|a!!"
    assert made.failed
    assert exchange.reason == "internal"


async def test_an_engine_that_breaks_in_a_whole_reply_is_an_error_and_its_tokens_are_billed() -> None:
    request = make_request(streamed=False)
    made, exchange = delivery(request, Saying(*tokens("a", "b")[:1], UpstreamLost("gone")))
    client = Client()
    with pytest.raises(UpstreamLost):
        await made.run(client.receive, client.send)
    assert client.messages == []
    assert exchange.usage.billed_generated == 1


@pytest.mark.parametrize("streamed", [True, False])
async def test_the_engine_stops_at_once_for_a_client_that_leaves(streamed: bool) -> None:
    engine = NullEnginePort(tokens_per_second=100)
    client = Client()
    made, exchange = delivery(make_request(most=1000, streamed=streamed), engine)
    task = asyncio.create_task(made.run(client.receive, client.send))
    await until(lambda: engine.generated > 0)
    client.leaves.set()
    with pytest.raises(ClientLeft):
        await task
    assert (engine.running, engine.aborted) == (0, 1)
    assert exchange.usage.billed_generated == engine.generated > 0


@pytest.mark.parametrize("turns", [1, 2, 3, 5])
@pytest.mark.parametrize("replies", [1, 3])
async def test_what_the_engine_was_ahead_when_a_client_left_is_billed(replies: int, turns: int) -> None:
    for leaves_after in range(10, 30):
        engine, client = Ahead(turns), Client()
        made, exchange = delivery(make_request(most=1000, replies=replies), engine)
        task = asyncio.create_task(made.run(client.receive, client.send))
        for _ in range(leaves_after):
            await asyncio.sleep(0)
        client.leaves.set()
        with pytest.raises(ClientLeft):
            await task
        assert exchange.usage.billed_generated == engine.generated > 0


async def test_a_client_that_does_not_read_holds_no_place_in_the_engine(unbounded: bool) -> None:
    if unbounded:
        pytest.skip("our server keeps what is not read: tests/gateway/edge has that client")
    engine = NullEnginePort()
    client = Client()
    client.reads.clear()
    made, exchange = delivery(make_request(most=500), engine)
    task = asyncio.create_task(made.run(client.receive, client.send))
    await until(lambda: exchange.usage.completed)
    assert engine.running == 0
    assert client.messages == []
    client.reads.set()
    await task
    assert client.body.startswith(b"<1| ")
    assert client.body.endswith(b"|500>")


async def test_what_one_turn_of_the_loop_makes_goes_out_together() -> None:
    class InOneTurn(Saying):
        async def generate(self, generation: Generation) -> AsyncGenerator[Delta, None]:
            for delta in tokens(*"abcd"):
                yield delta
            await asyncio.sleep(0.01)

    client, _, _ = await deliver(InOneTurn())
    assert client.body == b"<1|abcd|4>"
    assert [message.get("body") for message in client.messages[1:]] == [b"<1|abcd", b"|4>"]


@pytest.mark.parametrize("error", [RuntimeError("not what follows"), None])
async def test_a_server_that_refuses_to_send_ends_the_request(error: Exception | None, unbounded: bool) -> None:
    class Broken(Client):
        async def send(self, message: Message) -> None:
            if error is not None:
                raise error
            await asyncio.sleep(0)

    engine, client = NullEnginePort(tokens_per_second=50), Broken()
    made, _ = delivery(make_request(most=5 if error is None else 1000), engine)
    if error is None and not unbounded:
        return await made.run(client.receive, client.send)
    with pytest.raises(RuntimeError, match="what follows" if error else "waits"):
        await made.run(client.receive, client.send)
    assert engine.running == 0
    return None


async def test_observers_are_told_of_what_went_out_together() -> None:
    told, client = Told(), Client()
    said = [Delta((1, 2), "ab"), Delta((3,), ""), Delta((), "x"), Delta((4,), "d", "stop")]
    made, _ = delivery(make_request(), Saying(*said), [told])
    await made.run(client.receive, client.send)
    assert sum(tokens for _, tokens in told.sent_ones) == 4
    assert sum(chunks for chunks, _ in told.sent_ones) == 3  # of what brought text


async def test_the_first_token_is_what_counts_and_not_the_beginning_of_its_stream() -> None:
    engine = NullEnginePort(prefill_s=0.1)
    told = Told()
    made, exchange = delivery(make_request(most=3), engine, [told])
    client = Client()
    await made.run(client.receive, client.send)
    assert exchange.first_sent is not None
    assert exchange.first_sent - exchange.arrived >= 0.1
    assert sum(tokens for _, tokens in told.sent_ones) == 3


async def test_who_waits_is_told_in_a_comment_and_its_status_is_out_then() -> None:
    client, _, exchange = await deliver(Saying(Delta(note="moved\ndata: x"), *tokens("a")))
    assert client.body == b": moved data: x\n\n<1|a|1>"
    client = Client()
    _, made, _ = await deliver(Saying(Delta(note="moved"), UpstreamLost("gone")), client)
    assert made.failed
    assert client.body == b": moved\n\n!gone!"
    client, _, _ = await deliver(Saying(Delta(note="moved"), *tokens("a")), streamed=False)
    assert client.body == b"<1|a|1>"
    assert exchange.usage.generated == 1


async def test_a_client_that_left_before_is_noticed_before_anything_is_sent() -> None:
    client = Client()
    client.leaves.set()
    engine = Saying(*tokens(*"abcdefghijklmnop"))
    made, _ = delivery(make_request(), engine)
    with pytest.raises(ClientLeft):
        await made.run(client.receive, client.send)
    await settle()
    assert not client.whole
