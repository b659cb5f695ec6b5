"""One machine without containers: a hardened unit, its settings, and the proxies that bring TLS."""

import math

from synthia_vllm.manifests.common import OF_SEVERAL, longest_silence_s, settings_file
from synthia_vllm.manifests.files import Files, fill, to_yaml
from synthia_vllm.manifests.sizing import size
from synthia_vllm.settings import LOOPBACK, Settings


def render_systemd(settings: Settings, vllm_options: list[str]) -> Files:
    """Raises SetupError for settings that contradict one another or do not fit what `deploy` says of the machine."""
    sizing = size(settings, several=False)
    unit = fill(
        "synthia.service.jinja",
        options=" ".join(["--", *map(_quoted, vllm_options)]) if vllm_options else "",
        gpu=bool(sizing.gpus),
        stop_s=sizing.grace_s,
    )
    return {
        "systemd/synthia.service": unit,
        "systemd/settings.yaml": to_yaml(_settings(settings), comment="/etc/synthia/settings.yaml"),
        **render_proxies(settings),
    }


def render_proxies(settings: Settings) -> Files:
    """nginx and Caddy: TLS, no buffering of streams, and no time limit that is shorter than the gateway's own."""
    upstream = f"127.0.0.1:{settings.port}"
    given = {
        "domain": settings.deploy.domain,
        "upstream": upstream,
        "body": settings.max_body_bytes,
        "read_s": longest_silence_s(settings),
        "idle_s": math.ceil(settings.timeouts.idle),
    }
    return {
        "proxy/nginx.conf": fill("nginx.conf.jinja", **given),
        "proxy/Caddyfile": fill("Caddyfile.jinja", **given),
    }


def _settings(settings: Settings) -> dict[str, object]:
    own = settings_file(settings, without=OF_SEVERAL)
    # Behind the proxy all clients come from this machine, so that `auto` would let them in without keys.
    access = own.get("access", {})
    if settings.host in LOOPBACK and settings.access.mode == "auto":
        access = {**access, "mode": "keys"}
    return own | {"log_file": "-", "access": access}


def _quoted(word: str) -> str:
    """As systemd reads command lines: % and $ stand for something there."""
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{escaped}"' if any(letter in word for letter in " \"'\\;") else escaped
