"""One line a request: who, what, how long, what came of it. Never what was said, unless that is switched on."""

import logging
import sys
from contextlib import suppress
from time import perf_counter
from typing import Any, TextIO, cast

import structlog

from synthia_vllm.gateway.request import POLLED, Exchange, Observer
from synthia_vllm.settings import LogSettings

_LIVE = "/admin/live"  # polled by pages that are open; a refusal is worth a line


class Unfailing:
    """Writes to stderr as it is at that moment. What can't be written is lost: no request fails for a full disk."""

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):
            return sys.stderr.write(text)
        return 0

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            sys.stderr.flush()


def configure_logging(settings: LogSettings, gateway: int | None = None) -> None:
    """Sets up structlog for this process: JSON for machines, or columns for people, on stderr.

    `gateway`: which of several processes this is; each of its lines says so.
    """
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer()
        if settings.format == "json"
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    )
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            *([] if gateway is None else [lambda _, __, line: {**line, "gateway": gateway}]),
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.dict_tracebacks if settings.format == "json" else structlog.processors.format_exc_info,
            *([] if settings.format == "json" else [_printable]),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.WriteLoggerFactory(file=cast(TextIO, Unfailing())),
        cache_logger_on_first_use=True,
    )


def _printable(_: Any, __: str, line: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Shows a terminal nothing that it would obey: paths, names and texts are the clients'. JSON escapes by itself."""
    return {name: _escaped(value) if isinstance(value, str) else value for name, value in line.items()}


def _escaped(text: str) -> str:
    if text.isprintable():
        return text
    # Line breaks are a traceback's own; those in a value make the renderer quote it.
    return "".join(it if it.isprintable() or it in "\n\t" else it.encode("unicode_escape").decode() for it in text)


class RequestLog(Observer):
    """An observer that writes the lines."""

    def __init__(self, settings: LogSettings) -> None:
        self._on = settings.requests
        self._texts = settings.texts
        self._logger = structlog.get_logger("synthia_vllm.requests")

    def ended(self, exchange: Exchange) -> None:
        if not self._on or exchange.route in POLLED or (exchange.route == _LIVE and exchange.status == 200):
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
        if exchange.time_to_first_token is not None:
            line["time_to_first_token_s"] = round(exchange.time_to_first_token, 4)
        if exchange.reason:
            line["reason"] = exchange.reason
        if self._texts and exchange.body is not None:
            line["body"] = exchange.body.decode(errors="replace")
        self._logger.info("request", **line)
