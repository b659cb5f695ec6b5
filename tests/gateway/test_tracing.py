"""Spans that a real OTLP collector receives, over HTTP and over gRPC."""

from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as service
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest as Request
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse as Response
from starlette.types import Receive, Scope, Send

from benchmarks.null_engine import NullEngine
from synthia_vllm.errors import SetupError
from synthia_vllm.gateway.app import Gateway
from synthia_vllm.gateway.call import Call, call_of
from synthia_vllm.gateway.tracing import Tracing, open_tracing
from synthia_vllm.gateway.upstream import HttpUpstream
from synthia_vllm.settings import Settings, TracingSettings
from tests.gateway.asgi import post
from tests.gateway.live import serving
from tests.otlp_collector import Collector, Spans, collecting

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
BODY = {"model": "synthia", "prompt": "x", "max_tokens": 4, "stream": True}


@contextmanager
def over_http(spans: Spans) -> Iterator[dict[str, str]]:
    with collecting() as collector:
        collector.spans = spans
        yield {"otlp_endpoint": collector.endpoint, "protocol": "http/protobuf"}


@contextmanager
def over_grpc(spans: Spans) -> Iterator[dict[str, str]]:
    collector = Collector(0)
    collector.spans = spans

    class Servicer(service.TraceServiceServicer):
        def Export(self, request: Request, context: Any) -> Response:
            collector.take(request)
            return Response()

    server = grpc.server(futures.ThreadPoolExecutor(1))
    service.add_TraceServiceServicer_to_server(Servicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield {"otlp_endpoint": f"http://127.0.0.1:{port}", "protocol": "grpc"}
    server.stop(None).wait()


def settings(folder: Path, **tracing: Any) -> Settings:
    access = {"mode": "open", "database": f"sqlite:///{folder}/keys.db", "secret": "x" * 32}
    return Settings(access=access, tracing=tracing, log={"requests": False})  # type: ignore[arg-type]


class Recording(NullEngine):
    """The null engine, and the headers that it was asked with."""

    def __init__(self) -> None:
        super().__init__()
        self.headers: list[dict[bytes, bytes]] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            self.headers.append(dict(scope["headers"]))
        await super().__call__(scope, receive, send)


@pytest.mark.parametrize("collector", [over_http, over_grpc])
async def test_one_trace_from_the_client_to_the_engine(collector: Callable[..., Any], tmp_path: Path) -> None:
    spans: Spans = []
    engine = Recording()
    with collector(spans) as tracing, serving(engine) as port:
        upstream = HttpUpstream([f"http://127.0.0.1:{port}"])
        async with upstream, Gateway(upstream, settings(tmp_path, **tracing)) as gateway:
            answer = await post(gateway.app, BODY, headers={"traceparent": f"00-{TRACE}-{PARENT}-01"})
    assert answer.status == 200
    found = {span.name: span for span in spans}
    assert found.keys() == {"POST /v1/completions", "queue", "engine"}
    assert {span.trace_id.hex() for span in spans} == {TRACE}
    server = found["POST /v1/completions"]
    assert server.parent_span_id.hex() == PARENT
    assert found["queue"].parent_span_id == found["engine"].parent_span_id == server.span_id
    # vLLM hangs its own spans below this.
    assert engine.headers[0][b"traceparent"] == f"00-{TRACE}-{found['engine'].span_id.hex()}-01".encode()
    values = {pair.key: pair.value for pair in server.attributes}
    assert values["gen_ai.usage.output_tokens"].int_value == 4
    assert values["synthia.outcome"].string_value == "finished"
    assert server.start_time_unix_nano <= found["engine"].start_time_unix_nano
    assert [event.name for event in server.events] == ["first_token"]


async def test_the_engine_in_this_process_gets_the_servers_context(tmp_path: Path) -> None:
    spans: Spans = []
    engine = Recording()
    with over_http(spans) as tracing:
        async with Gateway(engine, settings(tmp_path, **tracing)) as gateway:
            await post(gateway.app, BODY)
    server = next(span for span in spans if span.name.startswith("POST"))
    expected = f"00-{server.trace_id.hex()}-{server.span_id.hex()}-".encode()
    assert engine.headers[0][b"traceparent"].startswith(expected)


async def test_a_resumed_stream_links_to_what_it_resumes(tmp_path: Path) -> None:
    spans: Spans = []
    engine = NullEngine()

    async def pool(scope: Scope, receive: Receive, send: Send) -> None:
        """Loses its first replica, as the cluster's pool does."""
        call = call_of(scope)
        assert call is not None
        assert call.trace is not None
        call.trace.attempt("a")
        call.trace.attempt("b")
        await engine(scope, receive, send)

    with over_http(spans) as tracing:
        async with Gateway(pool, settings(tmp_path, **tracing)) as gateway:
            await post(gateway.app, BODY)
    found = {span.name: span for span in spans}
    (link,) = found["resume"].links
    assert link.span_id == found["engine"].span_id
    assert found["resume"].trace_id == found["engine"].trace_id


async def test_what_a_client_does_not_want_sampled_is_not(tmp_path: Path) -> None:
    spans: Spans = []
    engine = Recording()
    with over_http(spans) as tracing:
        async with Gateway(engine, settings(tmp_path, **tracing)) as gateway:
            await post(gateway.app, BODY, headers={"traceparent": f"00-{TRACE}-{PARENT}-00"})
    assert not spans
    assert engine.headers[0][b"traceparent"].startswith(f"00-{TRACE}-".encode())
    assert engine.headers[0][b"traceparent"].endswith(b"-00")


async def test_without_an_endpoint_there_is_nothing_and_a_clients_context_passes(tmp_path: Path) -> None:
    engine = Recording()
    parent = f"00-{TRACE}-{PARENT}-01"
    async with Gateway(engine, settings(tmp_path)) as gateway:
        await post(gateway.app, BODY, headers={"traceparent": parent})
    assert engine.headers[0][b"traceparent"] == parent.encode()


async def test_a_collector_that_is_gone_costs_no_request(tmp_path: Path) -> None:
    class Gone:
        def export(self, spans: Any) -> Any:
            raise OSError("gone")

        def shutdown(self) -> None:
            pass

    tracing = Tracing(TracingSettings(otlp_endpoint="http://127.0.0.1:1"), Gone())
    call = Call(id="1", request_id="1", route="/v1/completions")
    tracing.open(call, "POST", {})
    assert call.trace is not None
    call.trace.end()
    await tracing.close()


def test_an_endpoint_that_is_no_url_is_refused() -> None:
    with pytest.raises(SetupError, match=r"--tracing\.otlp-endpoint"):
        open_tracing(TracingSettings(otlp_endpoint="localhost:4317"))
