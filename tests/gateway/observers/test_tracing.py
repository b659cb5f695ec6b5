"""Spans that a real OTLP collector receives, over HTTP and over gRPC."""

from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from concurrent import futures
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as service
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest as Request
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse as Response

from synthia_vllm.bench.null.port import NullEnginePort
from synthia_vllm.engine.port import Delta, Generation
from synthia_vllm.errors import SetupError
from synthia_vllm.gateway.app import Gateway
from synthia_vllm.gateway.observers.tracing import Tracing
from synthia_vllm.settings import Settings, TracingSettings, load_settings
from tests.gateway.asgi import post
from tests.gateway.layers import make_exchange, make_request
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


class Recording(NullEnginePort):
    """The null engine as if it ran under these names, one after the other, and the headers that it was asked with."""

    def __init__(self, *replicas: str) -> None:
        super().__init__()
        self.replicas = replicas or ("",)
        self.headers: list[Mapping[str, str]] = []

    async def generate(self, generation: Generation) -> AsyncGenerator[Delta, None]:
        on_attempt = generation.on_attempt
        self.headers += [on_attempt(replica) for replica in self.replicas]
        async for delta in super().generate(replace(generation, on_attempt=lambda replica: {})):
            yield delta


@pytest.mark.parametrize("collector", [over_http, over_grpc])
async def test_one_trace_from_the_client_to_the_engine(collector: Callable[..., Any], tmp_path: Path) -> None:
    spans: Spans = []
    engine = Recording("10.0.0.1:8000")
    with collector(spans) as tracing:
        async with Gateway(engine, settings(tmp_path, **tracing)) as gateway:
            answer = await post(gateway.app, BODY, headers={"traceparent": f"00-{TRACE}-{PARENT}-01"})
    assert answer.status == 200
    found = {span.name: span for span in spans}
    assert found.keys() == {"POST /v1/completions", "queue", "engine"}
    assert {span.trace_id.hex() for span in spans} == {TRACE}
    server = found["POST /v1/completions"]
    assert server.parent_span_id.hex() == PARENT
    assert found["queue"].parent_span_id == found["engine"].parent_span_id == server.span_id
    # vLLM hangs its own spans below this.
    assert engine.headers[0]["traceparent"] == f"00-{TRACE}-{found['engine'].span_id.hex()}-01"
    values = {pair.key: pair.value for pair in server.attributes}
    assert values["gen_ai.usage.output_tokens"].int_value == 4
    assert values["gen_ai.operation.name"].string_value == "text_completion"
    assert values["gen_ai.provider.name"].string_value == "vllm"
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
    assert engine.headers[0]["traceparent"].startswith(f"00-{server.trace_id.hex()}-{server.span_id.hex()}-")


async def test_a_resumed_stream_links_to_what_it_resumes(tmp_path: Path) -> None:
    spans: Spans = []
    with over_http(spans) as tracing:
        async with Gateway(Recording("a", "b"), settings(tmp_path, **tracing)) as gateway:
            await post(gateway.app, BODY)
    found = {span.name: span for span in spans}
    (link,) = found["resume"].links
    assert link.span_id == found["engine"].span_id
    assert found["resume"].trace_id == found["engine"].trace_id
    server = next(span for span in spans if span.name.startswith("POST"))
    assert {pair.key: pair.value for pair in server.attributes}["synthia.resumes"].int_value == 1


async def test_several_sequences_that_run_side_by_side_resume_nothing(tmp_path: Path) -> None:
    spans: Spans = []
    with over_http(spans) as tracing:
        async with Gateway(Recording("a"), settings(tmp_path, **tracing)) as gateway:
            await post(gateway.app, {**BODY, "n": 3})
    names = [span.name for span in spans]
    assert names.count("engine") == 3
    assert "resume" not in names
    server = next(span for span in spans if span.name.startswith("POST"))
    assert {pair.key: pair.value for pair in server.attributes}["synthia.resumes"].int_value == 0


async def test_what_a_client_does_not_want_sampled_is_not(tmp_path: Path) -> None:
    spans: Spans = []
    engine = Recording("a")
    with over_http(spans) as tracing:
        async with Gateway(engine, settings(tmp_path, **tracing)) as gateway:
            await post(gateway.app, BODY, headers={"traceparent": f"00-{TRACE}-{PARENT}-00"})
    assert not spans
    assert engine.headers[0]["traceparent"].startswith(f"00-{TRACE}-")
    assert engine.headers[0]["traceparent"].endswith("-00")


async def test_without_an_endpoint_there_is_nothing_and_a_clients_context_passes(tmp_path: Path) -> None:
    engine = Recording("a")
    parent = f"00-{TRACE}-{PARENT}-01"
    async with Gateway(engine, settings(tmp_path)) as gateway:
        await post(gateway.app, BODY, headers={"traceparent": parent})
    assert engine.headers[0] == {"traceparent": parent}


async def test_a_collector_that_is_gone_costs_no_request() -> None:
    class Gone:
        def export(self, spans: Any) -> Any:
            raise OSError("gone")

        def shutdown(self) -> None:
            pass

    tracing = Tracing(TracingSettings(otlp_endpoint="http://127.0.0.1:1"), Gone())
    exchange = make_exchange(make_request())
    tracing.opened(exchange)
    assert tracing.attempt(exchange, "a")["traceparent"]
    tracing.ended(exchange)
    await tracing.close()


def test_an_endpoint_that_is_no_url_is_refused() -> None:
    with pytest.raises(SetupError, match=r"--tracing\.otlp-endpoint"):
        load_settings(["--tracing.otlp-endpoint", "localhost:4317"])
