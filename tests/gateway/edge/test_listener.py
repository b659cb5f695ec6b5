import asyncio
import socket
import threading

import httpx
import pytest
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from synthia_vllm.errors import SetupError
from synthia_vllm.gateway.app import keys_required
from synthia_vllm.gateway.edge.listener import DrainingServer, bind_admin, check_exposure
from synthia_vllm.settings import AccessSettings, Settings


def test_the_second_signal_ends_at_once() -> None:
    server = DrainingServer(JSONResponse({}), Settings(), lambda: None)
    server.stop()
    assert (server.should_exit, server.force_exit) == (True, False)
    server.stop()
    assert server.force_exit


def test_a_port_for_operators_alone_has_their_routes_and_all_others() -> None:
    """As `serve` and `gateway` listen: two real sockets, one app."""
    admin = bind_admin(Settings(admin_port=0))
    assert admin is not None
    ready = threading.Event()
    with socket.socket() as public:
        public.bind(("127.0.0.1", 0))
        server = DrainingServer(_tells_path, Settings(drain_timeout=1.0), ready.set, admin=admin)

        async def serve() -> None:
            await server.serve(sockets=[public, admin])

        thread = threading.Thread(target=asyncio.run, args=(serve(),))
        thread.start()
        try:
            assert ready.wait(60)
            ports = [sock.getsockname()[1] for sock in (public, admin)]
            for path in ("/admin/keys", "/admin/live", "/metrics", "/sd", "/%61dmin/keys", "/admin/keys?x"):
                refused, answered = (httpx.get(f"http://127.0.0.1:{port}{path}", timeout=60) for port in ports)
                assert (refused.status_code, answered.status_code) == (404, 200), path
                assert refused.json()["error"]["type"] == "invalid_request_error"
            for path in ("/v1/models", "/ready", "/", "/metricsx", "/administer"):
                assert [httpx.get(f"http://127.0.0.1:{port}{path}", timeout=60).status_code for port in ports] == [
                    200
                ] * 2
            for method in ("POST", "OPTIONS", "HEAD", "DELETE"):
                url = f"http://127.0.0.1:{ports[0]}/admin/keys"
                assert httpx.request(method, url, timeout=60).status_code == 404, method
        finally:
            server.stop()
            thread.join(60)


async def _tells_path(scope: Scope, receive: Receive, send: Send) -> None:
    await JSONResponse({"path": scope["path"]})(scope, receive, send)


def test_an_address_for_operators_needs_a_port() -> None:
    assert bind_admin(Settings()) is None
    with pytest.raises(SetupError, match="add --admin-port"):
        bind_admin(Settings(admin_host="127.0.0.1"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(SetupError, match=r"--admin-port .* in use"):
            bind_admin(Settings(admin_port=taken.getsockname()[1]))


def test_an_address_for_operators_that_others_reach_asks_for_keys() -> None:
    elsewhere = {"admin_host": "192.0.2.1", "admin_port": 9000}
    assert not keys_required(Settings())
    assert keys_required(Settings(**elsewhere))
    assert not keys_required(Settings(admin_port=9000))
    with pytest.raises(SetupError, match=r"--admin-host 192\.0\.2\.1 .*--insecure"):
        check_exposure(Settings(**elsewhere, access=AccessSettings(mode="open")))


def test_an_open_server_for_others_needs_consent() -> None:
    is_open = AccessSettings(mode="open")
    for host in ("127.0.0.1", "::1", "localhost"):
        check_exposure(Settings(host=host, access=is_open))
    check_exposure(Settings(host="192.0.2.1"))  # asks for keys
    check_exposure(Settings(host="0.0.0.0", insecure=True, access=is_open))
    with pytest.raises(SetupError, match="--insecure"):
        check_exposure(Settings(host="192.0.2.1", access=is_open))
