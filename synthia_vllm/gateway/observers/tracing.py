"""OpenTelemetry traces: one a request, from its arrival to the last byte; vLLM's own spans hang below ours.

The server's span takes up the client's `traceparent` (W3C Trace Context), if there is one. Each time an engine is asked
there is a client's span below it, whose context goes to that engine; where a stream goes on at another replica, its
span links to the one before. Spans are sent by a thread of the SDK; a collector that is gone costs spans, no requests.
What was said is never in a span.
"""

import asyncio
import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from synthia_vllm.errors import SetupError
from synthia_vllm.gateway.request import POLLED, Exchange, Observer
from synthia_vllm.settings import TracingSettings

if TYPE_CHECKING:
    from opentelemetry.trace import Span, Tracer

_OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
    "/v1/messages": "chat",
    "/v1/completions": "text_completion",
}


class Tracing(Observer):
    """An observer that makes the spans of this process. Its provider is its own: vLLM sets the global one."""

    def __init__(self, settings: TracingSettings, exporter: Any = None) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio

        self._provider = TracerProvider(
            sampler=ParentBasedTraceIdRatio(settings.sample_ratio),
            resource=Resource.create({"service.name": "synthia-gateway"}),
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(BatchSpanProcessor(exporter or _exporter(settings)))
        self._tracer = self._provider.get_tracer("synthia_vllm")
        self._open: dict[str, Trace] = {}

    def opened(self, exchange: Exchange) -> None:
        if exchange.route not in POLLED:
            self._open[exchange.id] = Trace(self._tracer, exchange)

    def attempt(self, exchange: Exchange, replica: str, sequence: int = 0) -> Mapping[str, str]:
        """An engine is asked now for one of the sequences; the headers that go to it."""
        trace = self._open.get(exchange.id)
        return trace.attempt(replica, sequence) if trace is not None else exchange.trace

    def ended(self, exchange: Exchange) -> None:
        trace = self._open.pop(exchange.id, None)
        if trace is not None:
            trace.end()

    async def close(self) -> None:
        """Sends what is left."""
        await asyncio.to_thread(self._provider.shutdown)


class Trace:
    """The spans of one exchange."""

    def __init__(self, tracer: "Tracer", exchange: Exchange) -> None:
        from opentelemetry.trace import SpanKind, set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._propagator = TraceContextTextMapPropagator()
        self._tracer = tracer
        self._exchange = exchange
        route = exchange.route_name
        self._server = tracer.start_span(
            f"{exchange.method} {route}",
            context=self._propagator.extract(exchange.trace),
            kind=SpanKind.SERVER,
            start_time=self._unix(exchange.arrived),
            attributes={
                "http.request.method": exchange.method,
                "http.route": route,
                "synthia.request_id": exchange.request_id,
            },
        )
        self._context = set_span_in_context(self._server)
        self._attempts: dict[int, Span] = {}  # the latest, by sequence
        self._resumes = 0

    def attempt(self, replica: str, sequence: int = 0) -> dict[str, str]:
        """An engine is asked now for a sequence, or another one for its rest: returns the headers that go to it.

        An engine in this process has no span of its own here: its spans hang below the server's.
        """
        if not replica:
            return self._headers_of(self._context)
        from opentelemetry.trace import Link, SpanKind, set_span_in_context

        before = self._attempts.get(sequence)
        links = [Link(before.get_span_context(), {"synthia.link": "resumes"})] if before is not None else []
        if before is not None:
            before.end()
            self._resumes += 1
        self._attempts[sequence] = span = self._tracer.start_span(
            "resume" if before is not None else "engine",
            context=self._context,
            kind=SpanKind.CLIENT,
            links=links,
            attributes={"synthia.replica": replica, "synthia.generated_before": self._exchange.usage.generated},
        )
        return self._headers_of(set_span_in_context(span))

    def end(self) -> None:
        """The exchange has ended; its outcome and figures go into the server's span."""
        from opentelemetry.trace import Status, StatusCode

        exchange, usage = self._exchange, self._exchange.usage
        for attempt in self._attempts.values():
            attempt.end()
        ended = self._unix(exchange.ended if exchange.ended is not None else exchange.arrived)
        if usage.dispatched is not None:
            queue = self._tracer.start_span("queue", context=self._context, start_time=self._unix(exchange.arrived))
            queue.end(self._unix(usage.dispatched))
        if usage.first_token is not None:
            self._server.add_event("first_token", timestamp=self._unix(usage.first_token))
        self._server.set_attributes(
            {
                "enduser.id": exchange.account.user,
                **_operation(exchange.route_name),
                "gen_ai.request.model": exchange.model,
                "gen_ai.usage.input_tokens": usage.billed_prompt,
                "gen_ai.usage.output_tokens": usage.billed_generated,
                "http.response.status_code": exchange.status,
                "synthia.outcome": exchange.outcome,
                "synthia.queue_s": exchange.queue_wait,
                "synthia.resumes": self._resumes,
            }
        )
        if exchange.outcome == "failed" or exchange.status >= 500:
            self._server.set_status(Status(StatusCode.ERROR, exchange.reason or exchange.outcome))
        self._server.end(ended)

    def _headers_of(self, context: Any) -> dict[str, str]:
        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, context)
        return carrier

    def _unix(self, moment: float) -> int:
        """Nanoseconds of Unix time for one of the exchange's times."""
        return int((self._exchange.arrived_at + moment - self._exchange.arrived) * 1e9)


def _operation(route: str) -> dict[str, str]:
    """As OpenTelemetry's semantic conventions for generative AI name what was asked; nothing of other routes."""
    operation = _OPERATIONS.get(route)
    return {"gen_ai.operation.name": operation, "gen_ai.provider.name": "vllm"} if operation else {}


def check_tracing(settings: TracingSettings) -> None:
    """Raises SetupError where traces can't be sent as set; asks no collector."""
    if settings.otlp_endpoint is None:
        return
    for package in ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto"):
        try:
            importlib.import_module(package)
        except ImportError:
            raise SetupError(
                f"--tracing.otlp-endpoint: {package} is missing; pip install 'synthia-vllm[tracing]'"
            ) from None


def open_tracing(settings: TracingSettings) -> Tracing | None:
    """None where no endpoint is set. Raises SetupError as check_tracing does."""
    check_tracing(settings)
    return Tracing(settings) if settings.otlp_endpoint is not None else None


def _exporter(settings: TracingSettings) -> Any:
    endpoint = settings.otlp_endpoint
    if settings.protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc import trace_exporter as over_grpc

        assert endpoint is not None
        return over_grpc.OTLPSpanExporter(endpoint=endpoint, insecure=not endpoint.startswith("https"))
    from opentelemetry.exporter.otlp.proto.http import trace_exporter as over_http

    return over_http.OTLPSpanExporter(endpoint=endpoint)
