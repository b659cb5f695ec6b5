"""The simulator's state as arrays, and the queues and heaps on them. Compiled by numba; see `kernel` for the model.

Everything is a NamedTuple of arrays, which numba passes around at no cost; numbers that change live in `Totals`.
"""

from typing import Any, NamedTuple

import numpy as np
from numba import njit

Array = np.ndarray[Any, Any]
NONE = -1
WAITING, SERVED, REFUSED = 0, 1, 2  # of requests
OFF, STARTING, UP, DRAINING = 0, 1, 2, 3  # of replicas
# Indices into `totals`.
(
    ROOM_TOKENS,
    ROOM_REQUESTS,
    QUEUED,
    QUEUED_TOKENS,
    TURN,
    UP_COUNT,
    LATE,
    IN_FLIGHT,
    REPLICA_SECONDS,
    ENDED,
    HEAP,
    WEIGHTS,  # of users who wait or run
    TOTALS,
) = range(13)


class Requests(NamedTuple):
    """One entry a request. The first seven are given, the rest is found."""

    arrival: Array  # seconds; infinite for one that follows another
    user: Array
    prompt: Array
    output: Array
    cached: Array  # prompt tokens that the session's replica has already
    session: Array  # NONE: of no conversation
    follower: Array  # request that its client sends after this one, NONE for none
    think: Array  # seconds between this one's end and the follower
    first: Array  # time of the first token at the engine
    last: Array
    status: Array
    expected: Array  # generated tokens that the gateway counted with
    left: Array  # prompt tokens still to be computed
    admitted: Array  # holds KV cache
    after: Array  # next in the gateway's queue of its user, then in its replica's


class Users(NamedTuple):
    weight: Array
    head: Array
    tail: Array
    place: Array  # service had and under way, over weight: the scheduler's place
    running: Array
    held: Array  # tokens, of those
    mean: Array  # tokens that a whole reply came to of late; 0: not known
    queued: Array  # users with waiting requests, `queued_count[0]` of them
    position: Array  # where in `queued`
    queued_count: Array


class Replicas(NamedTuple):
    state: Array
    ready_at: Array
    in_flight: Array
    kv_used: Array
    running: Array  # sequences that decode
    steps: Array  # that it has made
    head: Array  # its own queue
    tail: Array
    completing: Array  # requests whose prefill ends with the step under way
    began: Array
    step_s: Array  # of the steps under way, noise included
    plain_s: Array  # and without noise
    making: Array  # steps under way
    cuttable: Array  # decode only: a newcomer gets in after the next step
    busy: Array
    finish_step: Array  # heap a replica: the step at which a sequence ends
    finish_request: Array
    order: Array  # indexed heap of replicas by the end of their steps
    spot: Array
    until: Array


class Engine(NamedTuple):
    decode_s: Array  # step time by number of sequences, 0 to max_seqs
    noise: Array  # quantiles of a step's time over its expected time; mean 1
    biased: Array  # the same for the step that a newcomer meets: long steps are met more often
    prompt_step_s: float  # more for a step with any prompt
    prefill_s: float  # a prompt token
    noise_sd: float
    max_seqs: int
    max_batched_tokens: int
    kv_tokens: int


@njit(cache=True)
def heap_push(keys: Array, requests: Array, size: int, key: float, request: int) -> None:
    """Onto a binary heap of `size` entries in two arrays, the least key first."""
    at = size
    while at > 0:
        parent = (at - 1) >> 1
        if keys[parent] <= key:
            break
        keys[at], requests[at] = keys[parent], requests[parent]
        at = parent
    keys[at], requests[at] = key, request


@njit(cache=True)
def heap_pop(keys: Array, requests: Array, size: int) -> int:
    """The request with the least key, from a heap of `size` entries."""
    found = requests[0]
    size -= 1
    key, request = keys[size], requests[size]
    at = 0
    while True:
        child = 2 * at + 1
        if child >= size:
            break
        if child + 1 < size and keys[child + 1] < keys[child]:
            child += 1
        if keys[child] >= key:
            break
        keys[at], requests[at] = keys[child], requests[child]
        at = child
    keys[at], requests[at] = key, request
    return int(found)


@njit(cache=True)
def set_until(replicas: Replicas, r: int, until: float) -> None:
    """When replica r has its next event."""
    order, spot, times = replicas.order, replicas.spot, replicas.until
    times[r] = until
    at = spot[r]
    while at > 0:
        parent = (at - 1) >> 1
        if times[order[parent]] <= until:
            break
        order[at] = order[parent]
        spot[order[at]] = at
        at = parent
    while True:
        child = 2 * at + 1
        if child >= len(order):
            break
        if child + 1 < len(order) and times[order[child + 1]] < times[order[child]]:
            child += 1
        if times[order[child]] >= until:
            break
        order[at] = order[child]
        spot[order[at]] = at
        at = child
    order[at] = r
    spot[r] = at


@njit(cache=True)
def push_finish(replicas: Replicas, r: int, step: int, request: int, size: int) -> None:
    """Onto replica r's heap of `size` entries."""
    heap_push(replicas.finish_step[r], replicas.finish_request[r], size, step, request)


@njit(cache=True)
def pop_finish(replicas: Replicas, r: int, size: int) -> int:
    """The request that ends first on replica r, from its heap of `size` entries."""
    return int(heap_pop(replicas.finish_step[r], replicas.finish_request[r], size))


@njit(cache=True)
def push_release(times: Array, requests: Array, totals: Array, time: float, request: int) -> None:
    """A request that follows another, to be sent at `time`."""
    heap_push(times, requests, int(totals[HEAP]), time, request)
    totals[HEAP] += 1


@njit(cache=True)
def pop_release(times: Array, requests: Array, totals: Array) -> int:
    found = heap_pop(times, requests, int(totals[HEAP]))
    totals[HEAP] -= 1
    return int(found)
