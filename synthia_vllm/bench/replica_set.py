"""Several null engines, each a process of its own, that can be killed, stopped and come back: a stand-in for Serve.

with ReplicaSet(16, options=["--tokens-per-second", "2"]) as replicas:
    replicas.wait()
    replicas.kill()
    pool.update(replicas.listing())
"""

import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import psutil

from synthia_vllm.free_ports import free_port

_START_TIMEOUT_S = 60.0


@dataclass
class Replica:
    """One process. `url` is where it listens, or will."""

    name: str
    host: str
    port: int
    process: "subprocess.Popen[bytes]" = field(repr=False)
    listening: bool = False
    died: float | None = None  # monotonic
    retired: bool = False
    replaced: bool = False

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"


class ReplicaSet:
    """Starts `count` null engines on free ports and keeps them: who dies is replaced.

    `listing` is what discovery would tell: a dead one stays in it for `notice_s`, a new one has a new name (and, unless
    `keep_ports`, a new port) and comes when it listens. Nothing runs in the background: `listing`, `wait` and `tend`
    look after the processes. Leaving ends them all.

    restart_s   a dead one is replaced after so long; None: never
    prefix      words before the command, for instance `ip netns exec NAME`; `host` is then its address there
    """

    def __init__(
        self,
        count: int,
        *,
        options: Sequence[str] = (),
        restart_s: float | None = 1.0,
        notice_s: float = 1.0,
        keep_ports: bool = False,
        name: str = "null",
        host: str = "127.0.0.1",
        prefix: Sequence[str] = (),
    ) -> None:
        self._options, self._prefix, self._host = options, prefix, host
        self._restart_s, self._notice_s, self._keep_ports = restart_s, notice_s, keep_ports
        self._count, self._name = count, name
        self._started = 0
        self.replicas: list[Replica] = []

    def __enter__(self) -> "ReplicaSet":
        try:
            for _ in range(self._count):
                self._start(free_port())
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends every process, the stopped ones too."""
        for replica in self.replicas:
            replica.process.kill()
        for replica in self.replicas:
            replica.process.wait()
        self.replicas.clear()

    def wait(self, count: int | None = None) -> None:
        """Until all (or `count`) listen. Raises TimeoutError."""
        deadline = time.monotonic() + _START_TIMEOUT_S
        while len(self.up()) < (self._count if count is None else count):
            if time.monotonic() > deadline:
                raise TimeoutError(f"of {self._count} null engines {len(self.up())} listen")
            time.sleep(0.05)
            self.tend()

    def listing(self) -> dict[str, str]:
        """Name and URL of each, as discovery sees them now."""
        self.tend()
        return {replica.name: replica.url for replica in self.replicas if replica.listening}

    def up(self) -> list[Replica]:
        return [replica for replica in self.replicas if replica.listening and replica.died is None]

    def named(self, name: str) -> Replica:
        return next(replica for replica in self.replicas if replica.name == name)

    def kill(self, name: str | None = None) -> Replica:
        """`kill -9`, of a random one if none is named; returns it."""
        replica = self.named(name) if name else random.choice(self.up())
        replica.process.kill()
        replica.process.wait()
        self.tend()
        return replica

    def stop(self, name: str) -> None:
        """SIGSTOP: it hangs, its connections stay open."""
        os.kill(self.named(name).process.pid, signal.SIGSTOP)

    def go_on(self, name: str) -> None:
        os.kill(self.named(name).process.pid, signal.SIGCONT)

    def add(self) -> str:
        """One more, of a new name."""
        self._count += 1
        self._start(free_port())
        return self.replicas[-1].name

    def retired(self) -> list[Replica]:
        return [replica for replica in self.replicas if replica.retired and replica.died is None]

    def retire(self, name: str) -> None:
        """Takes one out of the listing for good; its process goes on until `close`, and nothing replaces it."""
        replica = self.named(name)
        replica.listening, replica.retired, replica.replaced = False, True, True
        self._count -= 1

    def fault(self, name: str, **faults: Any) -> dict[str, Any]:
        """Switches faults of one; returns what it says of itself."""
        return ask(self.named(name).url, "POST", "/fault", faults)

    def tend(self) -> None:
        """Sees who has died or come up, and starts who is due."""
        now = time.monotonic()
        for replica in list(self.replicas):
            if replica.died is None and replica.process.poll() is not None:
                replica.died = now
            if replica.died is None:
                replica.listening = replica.listening or (not replica.retired and _listens(replica))
            elif self._restart_s is not None and not replica.replaced and now - replica.died >= self._restart_s:
                replica.replaced = True
                self._start(replica.port if self._keep_ports else free_port())
        self.replicas = [replica for replica in self.replicas if not self._forgotten(replica, now)]

    def memory_mib(self) -> list[float]:
        """Resident memory of each process that runs."""
        return [psutil.Process(replica.process.pid).memory_info().rss / 2**20 for replica in self.up()]

    def _forgotten(self, replica: Replica, now: float) -> bool:
        if replica.died is None:
            return False
        if now - replica.died >= self._notice_s:
            replica.listening = False
        return not replica.listening and (replica.replaced or self._restart_s is None)

    def _start(self, port: int) -> None:
        self._started += 1
        words = [*self._prefix, sys.executable, "-m", "synthia_vllm.bench.null.engine", "--host", self._host]
        process = subprocess.Popen(
            [*words, "--port", str(port), *self._options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            # A group of its own: Ctrl-C is for the one who asked for it.
            start_new_session=True,
        )
        self.replicas.append(Replica(f"{self._name}-{self._started}", self._host, port, process))


def ask(url: str, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """JSON from a null engine. Raises OSError where it is gone, ValueError for an error."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=5)
    try:
        connection.request(method, path, json.dumps(body or {}), {"content-type": "application/json"})
        reply = connection.getresponse()
        told = reply.read()
        if reply.status != 200:
            raise ValueError(f"{method} {path}: {reply.status} {told.decode(errors='replace')}")
        found: dict[str, Any] = json.loads(told)
        return found
    finally:
        connection.close()


def _listens(replica: Replica) -> bool:
    with suppress(OSError), socket.create_connection((replica.host, replica.port), 0.2):
        return True
    return False
