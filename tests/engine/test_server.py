import pytest
import uvicorn

from synthia_vllm.engine.server import DrainingServer, check_exposure
from synthia_vllm.errors import SetupError
from synthia_vllm.settings import Settings


def test_the_second_signal_ends_at_once() -> None:
    server = DrainingServer(uvicorn.Config(lambda: None), lambda: None)
    server.stop()
    assert (server.should_exit, server.force_exit) == (True, False)
    server.stop()
    assert server.force_exit


def test_only_loopback_needs_no_consent() -> None:
    for host in ("127.0.0.1", "::1", "localhost"):
        check_exposure(Settings(host=host))
    check_exposure(Settings(host="0.0.0.0", insecure=True))
    with pytest.raises(SetupError, match="--insecure"):
        check_exposure(Settings(host="192.0.2.1"))
