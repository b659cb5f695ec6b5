"""`/openapi.json`: valid, whole, and true of what the routes take."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from synthia_vllm.gateway.app import METHODS
from tests.gateway.whole import BODIES, House, house

OPERATORS = ("/admin/", "/metrics", "/sd")
BETWEEN_GATEWAYS = ("/inference/v1/abort",)


@pytest.fixture
async def home(tmp_path: Path) -> AsyncIterator[House]:
    async with house(tmp_path) as found:
        yield found


async def told(home: House) -> Any:
    reply = await home.get("nobody", "/openapi.json")
    assert reply.status == 200
    return reply.json()


async def test_it_has_every_route_that_clients_use(home: House) -> None:
    paths = (await told(home))["paths"]
    wanted = {path for path in METHODS if path not in (*OPERATORS, *BETWEEN_GATEWAYS) and not path.endswith("/")}
    below = {"/v1/models/{model}", "/v1/usage/{request_id}"}
    assert paths.keys() == wanted | below
    for path in wanted:
        assert tuple(paths[path]) == tuple(method.lower() for method in METHODS[path])


async def test_all_that_it_refers_to_is_there(home: House) -> None:
    document = await told(home)

    def references(node: Any) -> list[str]:
        if isinstance(node, list):
            return [found for item in node for found in references(item)]
        if not isinstance(node, dict):
            return []
        own = [node["$ref"]] if isinstance(node.get("$ref"), str) else []
        return own + [found for value in node.values() for found in references(value)]

    found = references(document)
    assert found
    for reference in found:
        node: Any = document
        for part in reference.removeprefix("#/").split("/"):
            node = node[part]


@pytest.mark.parametrize("path", BODIES)
async def test_a_good_body_fits_its_schema_and_a_bad_one_fits_neither(home: House, path: str) -> None:
    document = await told(home)
    content = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
    checked = jsonschema.Draft202012Validator({**content["schema"], "components": document["components"]})
    assert list(checked.iter_errors(BODIES[path])) == []
    for wrong in ({"model": 7}, {"messages": 7, "input": True, "prompt": {}, "tokens": "x"}):
        body = {**BODIES[path], **{name: value for name, value in wrong.items() if name in BODIES[path]}}
        assert list(checked.iter_errors(body)) != []
        assert (await home.post("alice", path, body)).status == 400


async def test_it_says_whether_keys_are_asked_for_and_can_be_switched_off(tmp_path: Path) -> None:
    for name in ("keys", "off"):
        (tmp_path / name).mkdir()
    async with house(tmp_path / "keys") as home:
        assert (await told(home))["security"] == [{"bearer": []}, {"x-api-key": []}]
    async with house(tmp_path / "off", openapi=False) as home:
        assert (await home.get("nobody", "/openapi.json")).status == 404
