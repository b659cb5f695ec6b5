"""Waiting until the clients have gone: what runs in a pod before it gets SIGTERM."""

import time
from collections.abc import Callable

import psutil

_LOOK_S = 1.0


def open_connections(port: int) -> int:
    """Connections of others to this machine's port that are open; what a container sees is its own network."""
    return sum(
        connection.status == psutil.CONN_ESTABLISHED and connection.laddr.port == port
        for connection in psutil.net_connections("tcp")
        if connection.laddr
    )


def drain(port: int, seconds: float, *, count: Callable[[int], int] = open_connections, quiet: int = 3) -> bool:
    """Waits until no connection has been open for `quiet` looks in a row; False where time ran out first.

    More than one look, since a balancer may send a last request before it has heard that no more are wanted.
    """
    deadline, calm = time.monotonic() + seconds, 0
    while calm < quiet:
        if time.monotonic() >= deadline:
            return False
        calm = 0 if count(port) else calm + 1
        time.sleep(_LOOK_S)
    return True
