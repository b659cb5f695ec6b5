"""Who finds whose prompts in the real engine's prefix cache, by what its usage tells."""

import httpx
import pytest

from tests.conftest import RunningServer
from tests.e2e.test_users import synthia

pytestmark = pytest.mark.e2e

LONG = "The orca hunts in the cold water of the north. " * 60  # several blocks of the cache


def test_a_prompt_is_found_again_by_its_user_alone(server: RunningServer, client: httpx.Client) -> None:
    keys = {user: synthia(server.data, "keys", "create", "--user", user) for user in ("finder", "seeker")}

    def cached(user: str, **fields: str) -> int:
        body = {"model": "synthia", "prompt": LONG, "max_tokens": 1, **fields}
        reply = client.post("/v1/completions", json=body, headers={"x-api-key": keys[user]}).raise_for_status()
        return int(reply.json()["usage"]["prompt_tokens_details"]["cached_tokens"])

    assert cached("finder") == 0
    assert cached("finder") > 256
    assert cached("seeker") == 0
    assert cached("seeker") > 256
    assert [cached("finder", cache_salt="mine"), cached("seeker", cache_salt="mine")] == [0, 0]
    assert cached("finder", cache_salt="mine") > 256
