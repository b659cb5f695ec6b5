import httpx
import pytest
from starlette.responses import JSONResponse

from synthia_vllm.gateway.routes import ROUTES, Routes


@pytest.fixture
def client() -> httpx.AsyncClient:
    upstream = JSONResponse({"data": [{"id": "synthia"}, {"id": "owner/model"}]})
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=Routes(upstream)), base_url="http://test")


@pytest.mark.parametrize("path", ROUTES)
async def test_routes_on_the_list_pass(client: httpx.AsyncClient, path: str) -> None:
    assert (await client.request(ROUTES[path], path)).status_code == 200


@pytest.mark.parametrize("path", ["/load", "/docs", "/v1/load_lora_adapter", "/v1/models/nothing", "/v1/chat"])
async def test_all_else_is_not_found(client: httpx.AsyncClient, path: str) -> None:
    response = await client.get(path)
    assert response.status_code == 404
    assert path in response.json()["error"]["message"]


async def test_a_wrong_method_says_which_is_right(client: httpx.AsyncClient) -> None:
    response = await client.get("/v1/chat/completions")
    assert response.status_code == 405
    assert "POST" in response.json()["error"]["message"]


@pytest.mark.parametrize("name", ["synthia", "owner/model", "owner%2Fmodel"])
async def test_one_model_is_found_by_its_id(client: httpx.AsyncClient, name: str) -> None:
    assert (await client.get(f"/v1/models/{name}")).json()["id"] == name.replace("%2F", "/")
