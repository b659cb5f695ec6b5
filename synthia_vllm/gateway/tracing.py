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
from urllib.parse import urlsplit

from synthia_vllm.errors import SetupError
from synthia_vllm.settings import TracingSettings

if TYPE_CHECKING:
    from opentelemetry.trace import Span, Tracer

    from synthia_vllm.gateway.call import Call

TRACE_HEADERS = (b"traceparent", b"tracestate")
_UNTRACED = ("/health", "/ready", "/metrics", "/sd")


class Tracing:
    """Makes the spans of this process. Its provider is its own: vLLM sets the global one."""

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

    def open(self, call: "Call", method: str, headers: Mapping[bytes, bytes]) -> None:
        if call.route not in _UNTRACED:
            call.trace = Trace(self._tracer, call, method, headers)

    async def close(self) -> None:
        """Sends what is left."""
        await asyncio.to_thread(self._provider.shutdown)


class Trace:
    """The spans of one call."""

    def __init__(self, tracer: "Tracer", call: "Call", method: str, headers: Mapping[bytes, bytes]) -> None:
        from opentelemetry.trace import SpanKind, set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._propagator = TraceContextTextMapPropagator()
        self._tracer = tracer
        self._call = call
        carrier = {name.decode(): headers[name].decode("latin-1") for name in TRACE_HEADERS if name in headers}
        route = "/admin" if call.route.startswith("/admin/") else call.route
        self._server = tracer.start_span(
            f"{method} {route}",
            context=self._propagator.extract(carrier),
            kind=SpanKind.SERVER,
            start_time=self._unix(call.arrived),
            attributes={"http.request.method": method, "http.route": route, "synthia.request_id": call.request_id},
        )
        self._context = set_span_in_context(self._server)
        self._attempt: Span | None = None

    def headers(self) -> list[tuple[bytes, bytes]]:
        """For an engine in this process."""
        return self._headers_of(self._context)

    def attempt(self, replica: str) -> list[tuple[bytes, bytes]]:
        """An engine is asked now, or another one for the rest: returns the headers that go to it."""
        from opentelemetry.trace import Link, SpanKind, set_span_in_context

        before = self._attempt
        links = [Link(before.get_span_context(), {"synthia.link": "resumes"})] if before is not None else []
        if before is not None:
            before.end()
        self._attempt = self._tracer.start_span(
            "resume" if before is not None else "engine",
            context=self._context,
            kind=SpanKind.CLIENT,
            links=links,
            attributes={"synthia.replica": replica, "synthia.generated_before": self._call.generated},
        )
        return self._headers_of(set_span_in_context(self._attempt))

    def end(self) -> None:
        """The call has ended; its outcome and figures go into the server's span."""
        from opentelemetry.trace import Status, StatusCode

        call = self._call
        if self._attempt is not None:
            self._attempt.end()
        ended = self._unix(call.ended if call.ended is not None else call.arrived)
        if call.dispatched is not None:
            queue = self._tracer.start_span("queue", context=self._context, start_time=self._unix(call.arrived))
            queue.end(self._unix(call.dispatched))
        if call.first_token is not None:
            self._server.add_event("first_token", timestamp=self._unix(call.first_token))
        self._server.set_attributes(
            {
                "enduser.id": call.account.user,
                "gen_ai.request.model": call.model,
                "gen_ai.usage.input_tokens": call.billed_prompt,
                "gen_ai.usage.output_tokens": call.billed_generated,
                "http.response.status_code": call.status,
                "synthia.outcome": call.outcome,
                "synthia.queue_s": call.queue_wait,
                "synthia.resumes": call.resumes,
            }
        )
        if call.outcome == "failed" or call.status >= 500:
            self._server.set_status(Status(StatusCode.ERROR, call.reason or call.outcome))
        self._server.end(ended)

    def _headers_of(self, context: Any) -> list[tuple[bytes, bytes]]:
        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, context)
        return [(name.encode(), value.encode("latin-1")) for name, value in carrier.items()]

    def _unix(self, moment: float) -> int:
        """Nanoseconds of Unix time for one of the call's times."""
        return int((self._call.arrived_at + moment - self._call.arrived) * 1e9)


def check_tracing(settings: TracingSettings) -> None:
    """Raises SetupError where traces can't be sent as set; asks no collector."""
    if settings.otlp_endpoint is None:
        return
    if urlsplit(settings.otlp_endpoint).scheme not in ("http", "https"):
        raise SetupError(f"--tracing.otlp-endpoint {settings.otlp_endpoint}: a URL like http://127.0.0.1:4317")
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
