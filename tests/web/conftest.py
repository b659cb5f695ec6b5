"""Servers with null engines to look at."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.running import Running, gateway, null_engine


@dataclass
class Site:
    url: str
    engines: list[Running]
    folder: Path
    server: Running


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """An open gateway in front of two null engines, 40 tokens a second each stream."""
    yield from _site(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def locked_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """The same with keys."""
    yield from _site(tmp_path_factory.mktemp("locked"), "--access.mode", "keys")


@pytest.fixture
def remembering(tmp_path: Path, redis_url: str) -> Iterator[Site]:
    """With a gateway that keeps replies."""
    yield from _site(tmp_path, "--limits.redis", redis_url, "--timeouts.redis", "30")


def _site(folder: Path, *options: str) -> Iterator[Site]:
    engines = [null_engine(folder / f"engine-{n}.log", "--tokens-per-second", "40") for n in range(2)]
    server = gateway(folder, engines, *options)
    try:
        for process in (*engines, server):
            process.start()
        yield Site(server.url, engines, folder, server)
    finally:
        for process in (server, *engines):
            process.stop()
