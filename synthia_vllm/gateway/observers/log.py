"""One line a request: who, what, how long, what came of it. Never what was said, unless that is switched on."""

import logging
import sys
from time import perf_counter

import structlog

from synthia_vllm.gateway.request import Exchange, Observer
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


class RequestLog(Observer):
    """An observer that writes the lines."""

    def __init__(self, settings: LogSettings) -> None:
        self._on = settings.requests
        self._texts = settings.texts
        self._logger = structlog.get_logger("synthia_vllm.requests")

    def ended(self, exchange: Exchange) -> None:
        if not self._on or exchange.route in _QUIET or (exchange.route in _POLLED and exchange.status == 200):
            return
        line = {
            "request_id": exchange.request_id,
            "id": exchange.id,
            "user": exchange.account.user,
            "route": exchange.route,
            "model": exchange.model,
            "status": exchange.status,
            "outcome": exchange.outcome,
            "prompt_tokens": exchange.usage.billed_prompt,
            "generated_tokens": exchange.usage.billed_generated,
            "queue_s": round(exchange.queue_wait, 4),
            "duration_s": round((exchange.ended or perf_counter()) - exchange.arrived, 4),
        }
        if exchange.usage.first_token is not None:
            line["time_to_first_token_s"] = round(exchange.usage.first_token - exchange.arrived, 4)
        if exchange.reason:
            line["reason"] = exchange.reason
        if self._texts and exchange.body is not None:
            line["body"] = exchange.body.decode(errors="replace")
        self._logger.info("request", **line)
