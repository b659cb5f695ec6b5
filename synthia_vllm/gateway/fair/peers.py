"""Whether gateways are before the same engines, and what each may fill where they can't settle it with each other."""

import hashlib
import platform
import socket
import sys
from collections.abc import Sequence
from dataclasses import replace
from urllib.parse import urlsplit

from synthia_vllm.engine.port import Capacity
from synthia_vllm.errors import SetupError
from synthia_vllm.settings import LOOPBACK


def share(capacity: Capacity, gateways: int) -> Capacity:
    """One gateway's part of what the engines hold: requests are spread evenly over gateways."""
    return replace(
        capacity,
        tokens=None if capacity.tokens is None else max(1, capacity.tokens // gateways),
        requests=None if capacity.requests is None else max(1, capacity.requests // gateways),
    )


def identity(engine: str) -> str:
    """The same for all gateways before one engine, as far as a URL tells."""
    found = urlsplit(engine.rstrip("/"))
    machine = platform.node() if found.hostname in LOOPBACK else ""
    port = found.port or {"http": 80, "https": 443}.get(found.scheme)
    return hashlib.sha256(f"{machine} {found.hostname}:{port}{found.path}".encode()).hexdigest()[:16]


def claim(engines: Sequence[str]) -> list[socket.socket]:
    """Takes engines for this gateway alone, as long as what is returned is open; on this machine, and on Linux only.

    Raises SetupError where another gateway of this machine has taken one.
    """
    held: list[socket.socket] = []
    for engine in engines if sys.platform == "linux" else ():
        name = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        held.append(name)
        try:
            name.bind(f"\0synthia-gateway-{identity(engine)}")  # no file: it goes with its process
        except OSError:
            for one in held:
                one.close()
            raise SetupError(
                f"--upstream {engine}: another gateway of this machine is before it, and each would fill all of its KV "
                "cache; give both the same --limits.redis, through which they share one queue, or --fair.gateways 2"
            ) from None
    return held
