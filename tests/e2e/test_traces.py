import time

import httpx
import pytest

from tests.otlp_collector import Collector

pytestmark = pytest.mark.e2e

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


def test_one_trace_from_the_client_through_the_gateway_to_the_engine(
    client: httpx.Client, collector: Collector
) -> None:
    body = {"model": "synthia", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
    client.post("/v1/chat/completions", json=body).raise_for_status()  # brings no trace
    client.post(
        "/v1/chat/completions", json=body, headers={"traceparent": f"00-{TRACE}-{PARENT}-01"}
    ).raise_for_status()
    deadline = time.monotonic() + 60
    found = {}
    while {"POST /v1/chat/completions", "llm_request"} - set(found):  # the engine's span of another trace is none
        assert time.monotonic() < deadline, [span.name for span in collector.spans]
        time.sleep(0.2)
        found = {span.name: span for span in collector.spans if span.trace_id.hex() == TRACE}
    gateway, engine = found["POST /v1/chat/completions"], found["llm_request"]
    assert gateway.parent_span_id.hex() == PARENT
    assert engine.parent_span_id == gateway.span_id
    assert gateway.start_time_unix_nano <= engine.start_time_unix_nano
    served = [span for span in collector.spans if span.name == "POST /v1/chat/completions"]
    assert len(served) == 1


def test_the_engines_own_series_stand_beside_ours(client: httpx.Client) -> None:
    body = {"model": "synthia", "prompt": "Hello", "max_tokens": 3, "ignore_eos": True}
    before = {name: value(client, name) for name in ("synthia", "vllm")}
    client.post("/v1/completions", json=body).raise_for_status()
    gained = {name: value(client, name) - before[name] for name in before}
    assert gained == {"synthia": 3, "vllm": 3}


def test_the_live_view_knows_the_engine_in_this_process(client: httpx.Client) -> None:
    (replica,) = client.get("/admin/live").json()["replicas"]
    assert (replica["name"], replica["running"], replica["waiting"]) == ("local", 0, 0)
    assert 0 <= replica["kv_use"] < 1


def value(client: httpx.Client, prefix: str) -> float:
    name = {"synthia": "synthia_generation_tokens_total", "vllm": "vllm:generation_tokens_total"}[prefix]
    lines = client.get("/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name}{{"))
