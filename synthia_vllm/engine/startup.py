"""What a person sees while an engine starts: one live line, the rest in a log file."""

import contextlib
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.status import Status

# What vLLM 0.29 writes to its log, and what it is then doing. The last one found counts.
_PHASES = (
    ("Initializing a V1 LLM engine", "starting the engine's processes"),
    ("Starting to load model", "loading the weights"),
    ("Loading weights took", "preparing the model"),
    ("Dynamo bytecode transform", "compiling"),
    ("Capturing CUDA graphs", "capturing CUDA graphs"),
    ("Warming up model", "warming up"),
    ("GPU KV cache size", "allocating the KV cache"),
    ("CPU KV cache size", "allocating the KV cache"),
    ("init engine", "warming up and starting the HTTP server"),
)
_POLL_S = 0.2
_ERROR = re.compile(r"\b\w*(?:Error|Exception): .+")


def phase_of(log: str) -> str | None:
    """What an engine is doing, by what it has written so far; None before vLLM says anything."""
    return next((phase for mark, phase in reversed(_PHASES) if mark in log), None)


class Startup:
    """Shows phase and seconds while the engine starts. On a terminal one line, elsewhere one line a phase.

    With `look` in the place of `start` it has no thread, and there is a line a phase everywhere.
    """

    def __init__(self, console: Console, log: Path | None) -> None:
        self._read = 0
        self._one_line = False
        self._console = console
        self._log = log
        self._phase = "importing vLLM"
        self._since = time.monotonic()
        self._done = threading.Event()
        self._status = Status(self._line(), console=console)
        self._thread = threading.Thread(target=self._follow, name="startup-line", daemon=True)

    def start(self) -> None:
        self._one_line = self._console.is_terminal
        if self._one_line:
            self._status.start()
        else:
            self._console.print(self._phase, highlight=False)
        self._thread.start()

    def look(self) -> None:
        """Reads on in the log, and tells where the engine is."""
        if self._log is not None:
            with self._log.open(encoding="utf-8", errors="replace") as log:
                log.seek(self._read)
                new = log.read()
                self._read = log.tell()
            self._advance(new)

    def stop(self) -> float:
        """Ends the line; returns the seconds since the start."""
        self._done.set()
        if self._thread.ident is not None:
            self._thread.join()
        self._status.stop()
        return time.monotonic() - self._since

    def _follow(self) -> None:
        while not self._done.wait(_POLL_S):
            self.look()
            self._status.update(self._line())

    def _advance(self, new: str) -> None:
        phase = phase_of(new) or self._phase
        if phase != self._phase:
            self._phase = phase
            if not self._one_line:
                self._console.print(self._line(), highlight=False)

    def _line(self) -> str:
        return f"{self._phase} ({time.monotonic() - self._since:.0f} s)"


@contextlib.contextmanager
def output_to(log: Path | None) -> Iterator[TextIO]:
    """Sends everything that this process and its children print to a file; yields the terminal as it was.

    The engine's processes inherit the file descriptors, so this catches what no logging configuration would. With None
    nothing is redirected.
    """
    if log is None:
        yield sys.stderr
        return
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
    terminal = os.fdopen(os.dup(2), "w", buffering=1)
    try:
        os.dup2(target, 1)
        os.dup2(target, 2)
        os.close(target)
        yield terminal
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, copy in enumerate(kept, start=1):
            os.dup2(copy, number)
            os.close(copy)


def cause(log: Path) -> str | None:
    """The first error in a log that is a cause and not a consequence: the engine's own come before the server's."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((found.group() for line in lines if (found := _ERROR.search(line))), None)
