"""One line a request: who, what, how long, what came of it. Never what was said, unless that is switched on."""

import logging
import sys
from time import perf_counter

import structlog

from synthia_vllm.gateway.call import Call
from synthia_vllm.settings import LogSettings

_QUIET = ("/health", "/ready", "/metrics", "/sd")  # asked by machines, all the time

_POLLED = ("/admin/live",)  # by pages that are open; a refusal is worth a line


def configure_logging(settings: LogSettings) -> None:
    """Sets up structlog for this process: JSON for machines, or columns for people, on stderr."""
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer()
        if settings.format == "json"
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    )
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.dict_tracebacks if settings.format == "json" else structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )


class RequestLog:
    def __init__(self, settings: LogSettings) -> None:
        self._on = settings.requests
        self._texts = settings.texts
        self._logger = structlog.get_logger("synthia_vllm.requests")

    def write(self, call: Call) -> None:
        if not self._on or call.route in _QUIET or (call.route in _POLLED and call.status == 200):
            return
        line = {
            "request_id": call.request_id,
            "id": call.id,
            "user": call.account.user,
            "route": call.route,
            "model": call.model,
            "status": call.status,
            "outcome": call.outcome,
            "prompt_tokens": call.billed_prompt,
            "generated_tokens": call.billed_generated,
            "queue_s": round(call.queue_wait, 4),
            "duration_s": round((call.ended or perf_counter()) - call.arrived, 4),
        }
        if call.first_token is not None:
            line["time_to_first_token_s"] = round(call.first_token - call.arrived, 4)
        if call.reason:
            line["reason"] = call.reason
        if self._texts and call.body is not None:
            line["body"] = call.body.decode(errors="replace")
        self._logger.info("request", **line)
