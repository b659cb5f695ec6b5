"""The engine's replicas as the gateway sees them, and what became of streams that lost theirs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol
from urllib.parse import urlsplit

import aiohttp
from prometheus_client import Counter

# up: takes requests; unproven: listed, but has not answered a canary yet; draining: finishes what it has;
# out: did not answer in time, or broke off.
ReplicaState = Literal["up", "unproven", "draining", "out"]

_MOST_BYTES = 16 * 2**20  # of an engine's page

STREAM_RESUMES = Counter(
    "synthia_stream_resumes_total",
    "Requests whose replica was lost under them, by what lost it and what became of the request.",
    ["reason", "result"],
)


@dataclass(frozen=True, slots=True)
class ReplicaView:
    """One replica at one moment."""

    name: str
    url: str  # where vLLM answers, `/metrics` included
    state: ReplicaState
    in_flight: int  # requests of this gateway


class ReplicaSource(Protocol):
    """Whoever knows the replicas."""

    def replicas(self) -> Sequence[ReplicaView]: ...


def engine_name(url: str) -> str:
    """How an engine without a name is called in metrics: host, port and path, without what a URL may hide."""
    parts = urlsplit(url)
    return parts.netloc.rpartition("@")[2] + parts.path.rstrip("/")


async def read_page(session: aiohttp.ClientSession, url: str, headers: Mapping[str, str]) -> str:
    """An engine's `/metrics`. Raises ValueError for what is none, and aiohttp's errors."""
    async with session.get(url, headers=headers) as reply:
        if reply.status != 200:
            raise ValueError(f"{url} answers {reply.status}")
        body = bytearray()
        async for part in reply.content.iter_any():
            body += part
            if len(body) > _MOST_BYTES:
                raise ValueError(f"{url} tells more than {_MOST_BYTES} bytes")
        return body.decode(errors="replace")
