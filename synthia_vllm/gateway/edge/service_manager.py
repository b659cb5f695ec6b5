"""Telling systemd that the server is ready, alive, or about to stop: the protocol of sd_notify(3)."""

import os
import socket
import time
from collections.abc import Mapping


class ServiceManager:
    """Sends to $NOTIFY_SOCKET; where there is none, nothing. A manager that does not listen is no reason to fail."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self._address = environment.get("NOTIFY_SOCKET", "")
        mine = environment.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        # Twice as often as it is asked for, as sd_watchdog_enabled(3) advises.
        self._period = int(environment.get("WATCHDOG_USEC", 0)) / 2e6 if mine else 0.0
        self._told = 0.0

    def ready(self) -> None:
        self._send("READY=1")

    def stopping(self) -> None:
        self._send("STOPPING=1")

    def alive(self) -> None:
        """To be called often by the loop whose hanging is to be noticed."""
        now = time.monotonic()
        if self._period and now - self._told >= self._period:
            self._told = now
            self._send("WATCHDOG=1")

    def _send(self, state: str) -> None:
        if not self._address:
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            try:
                sock.connect(address)
                sock.sendall(state.encode())
            except OSError:
                return
