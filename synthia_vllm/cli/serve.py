"""`synthia-vllm serve`."""

import json
import signal
import socket
import sys
import traceback
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import click
from rich.console import Console

from synthia_vllm.cli.reads import SERVE, settings_for
from synthia_vllm.errors import SetupError
from synthia_vllm.settings import Settings, refuse_gateways_options

if TYPE_CHECKING:
    from synthia_vllm.engine.server import Companion

PROG = "synthia-vllm serve"


@click.command(
    "serve", add_help_option=False, context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False}
)
@click.argument("words", nargs=-1, type=click.UNPROCESSED)
@click.pass_obj
def command(vllm_options: list[str] | None, words: tuple[str, ...]) -> None:
    """Serve the model on this machine."""
    sys.exit(serve(settings_for(SERVE, words), vllm_options or []))


def serve(settings: Settings, vllm_options: list[str], companion: "Companion | None" = None) -> int:
    """Starts, serves, drains; returns the exit code."""
    refuse_gateways_options(settings, PROG)
    if settings.gateways > 1:
        from synthia_vllm.cli.serve_several import serve_several

        assert companion is None
        return serve_several(settings, vllm_options)
    from synthia_vllm.engine.arguments import plan_engine, preload_once
    from synthia_vllm.engine.hardware import inspect_machine
    from synthia_vllm.engine.server import run
    from synthia_vllm.engine.startup import Startup, output_to
    from synthia_vllm.gateway.app import check_stores
    from synthia_vllm.gateway.edge.listener import bind, bind_admin, check_exposure
    from synthia_vllm.gateway.observers.log import configure_logging

    check_exposure(settings)
    machine = inspect_machine()
    preload_once(machine)
    check_stores(settings)
    sock, admin = bind(settings), bind_admin(settings)
    port = sock.getsockname()[1]
    signal.signal(signal.SIGTERM, _interrupt)
    plan = plan_engine(settings, machine, vllm_options)
    log = log_path(settings, port)
    with output_to(log) as terminal:
        configure_logging(settings.log)
        console = Console(file=terminal, soft_wrap=True)
        startup = Startup(console, log)

        def ready() -> None:
            seconds = startup.stop()
            console.print(ready_text(settings, port, plan.name, seconds, log, admin), highlight=False, markup=False)

        if plan.profile:
            console.print(f"profile {plan.profile}", highlight=False, markup=False)
        startup.start()
        try:
            return run(settings, plan, sock, ready, companion, admin=admin)
        except KeyboardInterrupt:
            startup.stop()
            console.print("interrupted while starting", highlight=False)
            return 130
        except SystemExit as error:  # vLLM's own parser did not like an option
            startup.stop()
            if log:
                console.print(log.read_text(errors="replace"), highlight=False, markup=False)
            return error.code if isinstance(error.code, int) else 1
        except Exception as error:
            startup.stop()
            traceback.print_exc()  # into the log
            raise engine_failed(log, error) from None
        finally:
            sock.close()


def engine_failed(log: Path | None, otherwise: object) -> SetupError:
    """The error of an engine that did not start: by its log, or else this."""
    from synthia_vllm.engine.startup import cause

    reason = (log and cause(log)) or otherwise
    where = f"\nThe whole log: {log}" if log else ""
    return SetupError(f"the engine failed: {reason}{where}\n`synthia-vllm doctor` looks for causes")


def ready_text(
    settings: Settings, port: int, model: str, seconds: float, log: Path | None, admin: socket.socket | None = None
) -> str:
    """What is printed when the server answers: where it is and a command that works as printed."""
    host = settings.host
    reach = "127.0.0.1" if host == "0.0.0.0" else f"[{host}]" if ":" in host else host
    url = f"http://{reach}:{port}"
    lines = [
        f"Ready after {seconds:.0f} s: {model} at {url} (also as synthia and synthia-tot)",
        *request_text(settings, url),
        *(["Keys and metrics: http://{}:{}".format(*admin.getsockname()[:2])] if admin else []),
        *([f"Log: {log}"] if log else []),
        "Stop with Ctrl-C: running requests finish first; a second Ctrl-C ends at once.",
    ]
    return "\n".join(lines)


def request_text(settings: Settings, url: str) -> list[str]:
    """How to send a first request, for `serve` and for `cluster up`."""
    from synthia_vllm.gateway.app import keys_required

    body = json.dumps({"model": "synthia", "messages": [{"role": "user", "content": "What is an orca?"}]})
    needs_key = keys_required(settings)
    return [
        "",
        f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json' \\",
        *(['    -H "Authorization: Bearer $SYNTHIA_API_KEY" \\'] if needs_key else []),
        f"    -d '{body}'",
        "",
        f"Talk to it: synthia-vllm chat --url {url}",
        *(["Keys: SYNTHIA_API_KEY=$(synthia-vllm keys create --user NAME)"] if needs_key else []),
    ]


def log_path(settings: Settings, port: int) -> Path | None:
    from synthia_vllm.engine.demo import cache_folder

    if settings.log_file == "-":
        return None
    return Path(settings.log_file) if settings.log_file else cache_folder() / "logs" / f"serve-{port}.log"


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
