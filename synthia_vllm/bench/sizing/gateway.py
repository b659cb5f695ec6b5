"""The gateway of the simulator: the fair queue (Virtual Token Counter) with its budget of tokens, and the router.

The rules are those of `synthia_vllm.gateway.fair` and `synthia_vllm.replicas.routing`. Generated tokens are charged
when a request is dispatched, as far as they are expected, and corrected at its end: the scheduler's place is the same
sum.
"""

import math
from typing import NamedTuple

from numba import njit

from synthia_vllm.bench.sizing.state import (
    IN_FLIGHT,
    NONE,
    QUEUED,
    QUEUED_TOKENS,
    ROOM_REQUESTS,
    ROOM_TOKENS,
    TURN,
    UP,
    UP_COUNT,
    WEIGHTS,
    Array,
    Engine,
    Replicas,
    Requests,
    Users,
)

_NEWCOMERS_SHARE = 1 / 16
_LEARNING_RATE = 0.1
PROMPT_COST, GENERATED_COST = 1.0, 2.0


class Gateway(NamedTuple):
    """Its settings. With `queue` off, requests go to the replicas at once, as with a plain server."""

    queue: bool
    max_queued: int
    max_wait_s: float
    max_load_factor: float
    overhead_s: float  # that a reply's tokens and the request spend outside the engine


@njit(cache=True)
def expected_output(requests: Requests, users: Users, i: int) -> float:
    mean = users.mean[requests.user[i]]
    return float(requests.output[i]) if mean == 0.0 else min(float(requests.output[i]), mean)


@njit(cache=True)
def join(requests: Requests, users: Users, totals: Array, i: int) -> None:
    """To the end of its user's queue. Who comes back is lifted to the least place of those who wait."""
    u = requests.user[i]
    requests.after[i] = NONE
    if users.head[u] == NONE:
        if users.running[u] == 0:
            totals[WEIGHTS] += users.weight[u]
        count = users.queued_count[0]
        if count:
            floor = users.place[users.queued[0]]
            for n in range(1, count):
                floor = min(floor, users.place[users.queued[n]])
            users.place[u] = max(users.place[u], floor)
        users.queued[count] = u
        users.position[u] = count
        users.queued_count[0] = count + 1
        users.head[u] = i
    else:
        requests.after[users.tail[u]] = i
    users.tail[u] = i
    totals[QUEUED] += 1
    totals[QUEUED_TOKENS] += requests.prompt[i] + requests.output[i]


@njit(cache=True)
def take_head(requests: Requests, users: Users, totals: Array, u: int) -> int:
    """The user's oldest waiting request, out of the queue."""
    i = users.head[u]
    users.head[u] = requests.after[i]
    requests.after[i] = NONE
    if users.head[u] == NONE:
        last = users.queued_count[0] - 1
        moved = users.queued[last]
        users.queued[users.position[u]] = moved
        users.position[moved] = users.position[u]
        users.queued_count[0] = last
        if users.running[u] == 0:
            totals[WEIGHTS] -= users.weight[u]
    totals[QUEUED] -= 1
    totals[QUEUED_TOKENS] -= requests.prompt[i] + requests.output[i]
    return int(i)


@njit(cache=True)
def next_user(users: Users, requests: Requests) -> int:
    """Whose turn it is: least service, then fewest running, then who came first."""
    best = users.queued[0]
    for n in range(1, users.queued_count[0]):
        u = users.queued[n]
        if users.place[u] != users.place[best]:
            if users.place[u] < users.place[best]:
                best = u
        elif users.running[u] != users.running[best]:
            if users.running[u] < users.running[best]:
                best = u
        elif requests.arrival[users.head[u]] < requests.arrival[users.head[best]]:
            best = u
    return int(best)


@njit(cache=True)
def fits(requests: Requests, users: Users, engine: Engine, totals: Array, i: int) -> bool:
    """Whether the engines have room for one more, a share kept for users who have less than half of theirs."""
    if totals[UP_COUNT] == 0:
        return False
    if totals[ROOM_REQUESTS] == 0:
        return True
    u = requests.user[i]
    part = max(users.held[u] / totals[ROOM_TOKENS], users.running[u] / totals[ROOM_REQUESTS])
    share = 1.0 if part < users.weight[u] / (2.0 * totals[WEIGHTS]) else 1.0 - _NEWCOMERS_SHARE
    most = max(1, int(totals[UP_COUNT] * engine.max_seqs * share))
    if totals[ROOM_REQUESTS] >= most:
        return False
    held = requests.prompt[i] + expected_output(requests, users, i)
    return bool(totals[ROOM_TOKENS] + held <= totals[UP_COUNT] * engine.kv_tokens * share)


@njit(cache=True)
def charge(requests: Requests, users: Users, totals: Array, i: int) -> None:
    """At dispatch."""
    u = requests.user[i]
    requests.expected[i] = expected_output(requests, users, i)
    if users.running[u] == 0 and users.head[u] == NONE:
        totals[WEIGHTS] += users.weight[u]
    users.running[u] += 1
    users.held[u] += requests.prompt[i] + requests.expected[i]
    users.place[u] += (PROMPT_COST * requests.prompt[i] + GENERATED_COST * requests.expected[i]) / users.weight[u]
    totals[ROOM_REQUESTS] += 1
    totals[ROOM_TOKENS] += requests.prompt[i] + requests.expected[i]


@njit(cache=True)
def settle(requests: Requests, users: Users, totals: Array, i: int) -> None:
    """At the end."""
    u = requests.user[i]
    users.running[u] -= 1
    users.held[u] -= requests.prompt[i] + requests.expected[i]
    if users.running[u] == 0 and users.head[u] == NONE:
        totals[WEIGHTS] -= users.weight[u]
    users.place[u] += GENERATED_COST * (requests.output[i] - requests.expected[i]) / users.weight[u]
    mean = users.mean[u]
    users.mean[u] = requests.output[i] if mean == 0.0 else mean + _LEARNING_RATE * (requests.output[i] - mean)
    totals[ROOM_REQUESTS] -= 1
    totals[ROOM_TOKENS] -= requests.prompt[i] + requests.expected[i]


@njit(cache=True)
def pick(replicas: Replicas, totals: Array, home: int, max_load_factor: float) -> int:
    """The replica for a request: its conversation's, unless that has too much to do; else the least busy, in turn."""
    if home != NONE and replicas.state[home] == UP:
        bound = math.ceil(max_load_factor * (totals[IN_FLIGHT] + 1) / totals[UP_COUNT])
        if replicas.in_flight[home] < bound:
            return home
    size = len(replicas.state)
    totals[TURN] += 1
    start = int(totals[TURN]) % size
    best, least = NONE, 0
    for part in range(2):
        low, high = (start, size) if part == 0 else (0, start)
        for r in range(low, high):
            if replicas.state[r] == UP and (best == NONE or replicas.in_flight[r] < least):
                best, least = r, replicas.in_flight[r]
                if least == 0:
                    return best
    return best
