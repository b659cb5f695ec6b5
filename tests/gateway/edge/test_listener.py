import pytest
from starlette.responses import JSONResponse

from synthia_vllm.errors import SetupError
from synthia_vllm.gateway.edge.listener import DrainingServer, check_exposure
from synthia_vllm.settings import AccessSettings, Settings


def test_the_second_signal_ends_at_once() -> None:
    server = DrainingServer(JSONResponse({}), Settings(), lambda: None)
    server.stop()
    assert (server.should_exit, server.force_exit) == (True, False)
    server.stop()
    assert server.force_exit


def test_an_open_server_for_others_needs_consent() -> None:
    is_open = AccessSettings(mode="open")
    for host in ("127.0.0.1", "::1", "localhost"):
        check_exposure(Settings(host=host, access=is_open))
    check_exposure(Settings(host="192.0.2.1"))  # asks for keys
    check_exposure(Settings(host="0.0.0.0", insecure=True, access=is_open))
    with pytest.raises(SetupError, match="--insecure"):
        check_exposure(Settings(host="192.0.2.1", access=is_open))
