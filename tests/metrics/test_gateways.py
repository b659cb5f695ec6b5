"""Four real gateways before one engine, and a real Prometheus that meets them in turn, or always the same one."""

import json
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path
from typing import Any

import httpx

from synthia_vllm.metrics.shared import PERIOD_S
from tests.prometheus_service import Prometheus, running_prometheus
from tests.running import Running, gateway, null_engine, until

TOKENS, TOKENS_PER_SECOND, CLIENTS = 20, 40, 8
FINISHED = 'synthia_requests_total{user="anonymous",model="synthia",route="/v1/completions",outcome="finished"}'


class Client(threading.Thread):
    """One stream after the other, each from the next gateway."""

    def __init__(self, gateways: list[Running], first: int) -> None:
        super().__init__()
        self.finished: list[tuple[float, str]] = []  # when, and from which gateway
        self.stop = threading.Event()
        self._gateways = gateways
        self._first = first

    def run(self) -> None:
        body = {"model": "synthia", "prompt": "x", "max_tokens": TOKENS, "stream": True}
        with httpx.Client(trust_env=False, timeout=20) as client:
            for number in count(self._first):
                if self.stop.is_set():
                    return
                url = self._gateways[number % len(self._gateways)].url
                try:
                    reply = client.post(f"{url}/v1/completions", json=body)
                except httpx.HTTPError:
                    continue
                if reply.is_success and reply.text.endswith("data: [DONE]\n\n"):
                    self.finished.append((time.monotonic(), url))


@contextmanager
def in_turn(gateways: list[Running], told: list[float]) -> Iterator[int]:
    """The port of a stand-in for a balancer: each request meets the next gateway that answers. Notes what it tells."""
    turn = count()

    class Balancer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            for number in (next(turn) for _ in gateways):
                try:
                    page = httpx.get(gateways[number % len(gateways)].url + self.path, trust_env=False)
                except httpx.HTTPError:
                    continue
                told.append(number_of(FINISHED, page.text))
                with suppress(OSError):  # it was too slow for who asked
                    self.send_response(page.status_code)
                    self.send_header("content-type", page.headers["content-type"])
                    self.end_headers()
                    self.wfile.write(page.content)
                return

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Balancer)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def number_of(series: str, page: str) -> float:
    found = re.search(rf"^{re.escape(series)} (\S+)$", page, re.MULTILINE)
    return float(found[1]) if found else 0.0


RATES = (
    'sum(rate(synthia_generation_tokens_total{job="%s"}[5s]))',
    'rate(sum(synthia_generation_tokens_total{job="%s"})[5s:1s])',
    'sum(rate(synthia_inter_token_latency_seconds_count{job="%s"}[5s]))',
)


def test_sums_have_no_spike_and_no_hole_when_a_gateway_is_killed_and_replaced(tmp_path: Path, redis_url: str) -> None:
    """And they are what the clients counted, less what the killed one had finished in its last second."""
    engine = null_engine(tmp_path / "engine.log", "--tokens-per-second", str(TOKENS_PER_SECOND)).start()
    gateways = [gateway(tmp_path, [engine], "--limits.redis", redis_url) for _ in range(4)]
    told: list[float] = []
    try:
        with ThreadPoolExecutor() as starting:
            list(starting.map(Running.start, gateways))
        clients = [Client(gateways, first) for first in range(CLIENTS)]
        with in_turn(gateways, told) as port:
            jobs = {"in_turn": port, "one": gateways[0].port}
            with running_prometheus(tmp_path, scraping(jobs)) as prometheus:
                for client in clients:
                    client.start()
                until(lambda: rate_of(prometheus) > 0.7 * CLIENTS * TOKENS_PER_SECOND, "all clients are served", 20)
                began, killed = time.time(), time.monotonic()
                gateways[3].kill()
                gateways[3].start()
                time.sleep(6)
                ended = time.time()
                for client in clients:
                    client.stop.set()
                for client in clients:
                    client.join()
                time.sleep(2.5)
                rates = [prometheus.query_range(rate % job, began, ended, 1) for job in jobs for rate in RATES]
                finals = [prometheus.query(f'sum({FINISHED[:-1]},job="{job}"}})')[0]["value"][1] for job in jobs]
        pages = [httpx.get(f"{one.url}/metrics", trust_env=False).text for one in gateways]
        own = [httpx.get(f"{one.url}/metrics?scope=own", trust_env=False).text for one in gateways]
        view = httpx.get(f"{gateways[1].url}/admin/live", trust_env=False).json()
    finally:
        with ThreadPoolExecutor() as ending:
            list(ending.map(Running.stop, (*gateways, engine)))
    finished = [one for client in clients for one in client.finished]
    most = CLIENTS * TOKENS_PER_SECOND
    had = TOKENS * sum(at > killed for at, _ in finished) / (ended - began)
    for (series,) in rates:
        values = [float(value) for _, value in series["values"]]
        print(f"{min(values):.0f} to {max(values):.0f} tokens/s; clients had {had:.0f}, at most {most} can be")
        assert len(values) > 6
        assert 0.4 * had <= min(values) <= max(values) <= 1.25 * most
    assert told == sorted(told)  # whichever it met
    late = [one for one in finished if one[1] == gateways[3].url and killed - 1.2 * PERIOD_S < one[0] < killed]
    sums = {number_of(FINISHED, page) for page in pages} | {float(value) for value in finals}
    print(f"finished: {len(finished)}, in the killed one's last second {len(late)}; told: {sums}")
    assert len(sums) == 1
    assert len(finished) - len(late) <= sums.pop() <= len(finished)
    assert {number_of("synthia_gateways", page) for page in pages} == {4}
    assert sum(number_of(FINISHED, page) for page in own) < len(finished) - len(late)  # none of what the killed one did
    check_live(view, most)


def rate_of(prometheus: Prometheus) -> float:
    found = prometheus.query(RATES[0] % "one")
    return float(found[0]["value"][1]) if found else 0.0


def scraping(jobs: dict[str, int]) -> str:
    return json.dumps(
        {
            "global": {"scrape_interval": "1s", "scrape_timeout": "1s"},
            "scrape_configs": [
                {"job_name": job, "static_configs": [{"targets": [f"127.0.0.1:{port}"]}]} for job, port in jobs.items()
            ],
        }
    )


def check_live(view: dict[str, Any], most: float) -> None:
    """The live view of one gateway that did a quarter of the work."""
    assert view["server"]["gateways"] == 4
    (user,) = view["users"]
    assert user["in_flight"] == view["now"]["running"] == 0
    assert user["slo_met"] + user["slo_missed"] == view["slo"]["met"] + view["slo"]["missed"]
    rates = view["history"]["generation_per_s"]
    assert 0.4 * most <= max(rates) <= 1.25 * most
