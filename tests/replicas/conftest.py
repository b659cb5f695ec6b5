"""Apps over real sockets."""

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.gateway.live import serving
from tests.replicas.engines import Live


@pytest.fixture
def live() -> Iterator[Live]:
    """Serves an app as long as the test runs; its URL."""
    with ExitStack() as stack:
        yield lambda app: f"http://127.0.0.1:{stack.enter_context(serving(app))}"
