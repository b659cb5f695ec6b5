"""Ports for processes that are told theirs before they listen: a local Ray, what tests and benchmarks start.

The system hands out ports of its own range, to every connection that leaves this machine and to whoever binds to 0. One
found there may be gone when its process starts, seconds later (seen: HAProxy's, under a full test run). So these are
from below that range.
"""

import itertools
import random
import socket
from functools import cache
from pathlib import Path

from synthia_vllm.errors import SetupError

_FIRST = 20_000  # above the range in which Ray's workers look, 10002 to 19999
_SYSTEMS = Path("/proc/sys/net/ipv4/ip_local_port_range")  # Linux
_SYSTEMS_FIRST = 49_152  # by RFC 6335, where nobody says


def free_ports(count: int) -> list[int]:
    """Ports that nobody uses on any address of this machine, none of them given before. Raises SetupError."""
    candidates, found = _candidates(), []
    for port in itertools.islice(candidates, _last() - _FIRST):
        if _is_free(port):
            found.append(port)
        if len(found) == count:
            return found
    raise SetupError(f"{count} free ports were looked for between {_FIRST} and {_last()}: there are not so many")


def free_port() -> int:
    """One of them."""
    return free_ports(1)[0]


@cache
def _candidates() -> "itertools.cycle[int]":
    """In order, from anywhere: two processes that look at once are unlikely to look at the same."""
    ports = list(range(_FIRST, _last()))
    start = random.SystemRandom().randrange(len(ports))
    return itertools.cycle(ports[start:] + ports[:start])


@cache
def _last() -> int:
    """Where the system's own begin; where they begin too low to leave any, there is nothing better than its own."""
    try:
        first = int(_SYSTEMS.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        first = _SYSTEMS_FIRST
    return first if first > _FIRST + 1000 else 65_536


def _is_free(port: int) -> bool:
    with socket.socket() as sock:
        try:
            sock.bind(("", port))
        except OSError:
            return False
    return True
