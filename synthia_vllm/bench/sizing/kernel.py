"""The event loop of the simulator, compiled by numba: about a million requests a few seconds.

An engine step takes `decode_s[sequences]`, with prompts `prompt_step_s + prefill_s * prompt tokens` more, times noise.
Each step decodes one token of each running sequence and computes as much of the waiting prompts as the token budget
leaves (vLLM's chunked prefill, first come first served). While no prompt waits, all steps up to the next end of a
sequence are one event; a newcomer cuts it short after the step under way. So the work is per request, not per token.
KV cache is held for the whole of a request from its first step on: preemption is not simulated.
"""

import math
import random

from numba import njit

from synthia_vllm.bench.sizing.autoscaler import TICK_S, Autoscaler, tick
from synthia_vllm.bench.sizing.gateway import Gateway, charge, fits, join, next_user, pick, settle, take_head
from synthia_vllm.bench.sizing.state import (
    ENDED,
    HEAP,
    IN_FLIGHT,
    LATE,
    NONE,
    QUEUED,
    REFUSED,
    SERVED,
    Array,
    Engine,
    Replicas,
    Requests,
    Users,
    pop_finish,
    pop_release,
    push_finish,
    push_release,
    set_until,
)

_INFINITE = math.inf
# Of the histogram of step times: seconds of the first bin, and bins a factor e.
HISTOGRAM_FROM, HISTOGRAM_BINS, HISTOGRAM_PER_E = 1e-4, 700, 50


@njit(cache=True)
def start_step(requests: Requests, replicas: Replicas, engine: Engine, r: int, now: float) -> None:
    running = replicas.running[r]
    budget = engine.max_batched_tokens - running
    tokens, completing = 0, 0
    i = replicas.head[r]
    while i != NONE and budget > 0:
        if not requests.admitted[i]:
            need = requests.prompt[i] + requests.output[i]
            busy = running + completing
            if busy and (busy >= engine.max_seqs or replicas.kv_used[r] + need > engine.kv_tokens):
                break
            replicas.kv_used[r] += need
            requests.admitted[i] = True
        share = min(budget, requests.left[i])
        requests.left[i] -= share
        budget -= share
        tokens += share
        if requests.left[i]:
            break
        completing += 1
        i = requests.after[i]
    if not tokens and not running:
        replicas.busy[r] = False
        set_until(replicas, r, _INFINITE)
        return
    plain = engine.decode_s[min(running + completing, engine.max_seqs)]
    if tokens:
        plain += engine.prompt_step_s + engine.prefill_s * tokens
    count = 1 if tokens else replicas.finish_step[r, 0] - replicas.steps[r]
    if count == 1:
        noise = engine.noise[int(random.random() * len(engine.noise))]
    else:
        noise = max(0.5, 1.0 + engine.noise_sd / math.sqrt(count) * random.gauss(0.0, 1.0))
    replicas.completing[r], replicas.making[r] = completing, count
    replicas.plain_s[r], replicas.step_s[r] = plain, plain * noise
    replicas.began[r], replicas.cuttable[r], replicas.busy[r] = now, not tokens, True
    set_until(replicas, r, now + count * plain * noise)


@njit(cache=True)
def offer(requests: Requests, replicas: Replicas, engine: Engine, r: int, i: int, now: float, stepping: int) -> None:
    """Gives a request to a replica. `stepping` is the one that begins a step by itself in a moment."""
    requests.after[i] = NONE
    if replicas.head[r] == NONE:
        replicas.head[r] = i
    else:
        requests.after[replicas.tail[r]] = i
    replicas.tail[r] = i
    if r == stepping:
        return
    if not replicas.busy[r]:
        # A step begins with all that came at this moment, not with the first of it.
        replicas.busy[r], replicas.cuttable[r], replicas.making[r] = True, False, 0
        set_until(replicas, r, now)
    elif replicas.cuttable[r] and replicas.making[r] > 1:
        done = math.ceil((now - replicas.began[r]) / replicas.step_s[r])
        replicas.making[r] = min(replicas.making[r], max(1, done))
        replicas.cuttable[r] = False
        until = replicas.began[r] + replicas.making[r] * replicas.step_s[r]
        if engine.noise_sd > 0.0:
            # The steps so far were taken as equally long; the one under way is not.
            under_way = engine.biased[int(random.random() * len(engine.biased))]
            until = now + random.random() * replicas.plain_s[r] * under_way
        set_until(replicas, r, until)


@njit(cache=True)
def ended(
    requests: Requests, gateway: Gateway, totals: Array, releases: tuple[Array, Array], i: int, status: int, now: float
) -> None:
    """Its client has the whole reply or the refusal, and goes on with what it wanted to send next."""
    requests.status[i] = status
    totals[ENDED] += 1
    follower = requests.follower[i]
    if follower != NONE:
        push_release(releases[0], releases[1], totals, now + gateway.overhead_s + requests.think[i], follower)


@njit(cache=True)
def refuse(
    requests: Requests, gateway: Gateway, totals: Array, releases: tuple[Array, Array], i: int, now: float
) -> None:
    totals[LATE] += 1
    ended(requests, gateway, totals, releases, i, REFUSED, now)


@njit(cache=True)
def dispatch(
    requests: Requests,
    users: Users,
    replicas: Replicas,
    engine: Engine,
    gateway: Gateway,
    homes: Array,
    totals: Array,
    releases: tuple[Array, Array],
    now: float,
    stepping: int,
) -> None:
    """Sends what waits at the gateway to replicas, as far as there is room."""
    while totals[QUEUED]:
        u = next_user(users, requests)
        i = users.head[u]
        if now - requests.arrival[i] > gateway.max_wait_s:
            take_head(requests, users, totals, u)
            refuse(requests, gateway, totals, releases, i, now)
            continue
        if gateway.queue and not fits(requests, users, engine, totals, i):
            break
        session = requests.session[i]
        home = homes[session] if session != NONE else NONE
        r = pick(replicas, totals, home, gateway.max_load_factor)
        if r == NONE:
            break
        take_head(requests, users, totals, u)
        charge(requests, users, totals, i)
        requests.left[i] = requests.prompt[i]
        if session != NONE:
            if r == home:
                requests.left[i] -= requests.cached[i]
            homes[session] = r
        requests.left[i] = max(1, requests.left[i])
        replicas.in_flight[r] += 1
        totals[IN_FLIGHT] += 1
        offer(requests, replicas, engine, r, i, now, stepping)


@njit(cache=True)
def end_steps(
    requests: Requests,
    users: Users,
    replicas: Replicas,
    engine: Engine,
    gateway: Gateway,
    totals: Array,
    releases: tuple[Array, Array],
    histogram: Array,
    counted_from: float,
    ttft_limit: float,
    r: int,
    now: float,
) -> None:
    """Tokens of the steps that replica r has just made."""
    count = replicas.making[r]
    if count == 0:  # it was idle, and wakes up
        return
    replicas.steps[r] += count
    if now >= counted_from:
        spot = int(HISTOGRAM_PER_E * math.log(replicas.plain_s[r] / HISTOGRAM_FROM))
        histogram[min(HISTOGRAM_BINS - 1, max(0, spot))] += count * replicas.running[r]
    for _ in range(replicas.completing[r]):
        i = replicas.head[r]
        replicas.head[r] = requests.after[i]
        requests.first[i] = now
        if requests.arrival[i] >= counted_from and now + gateway.overhead_s - requests.arrival[i] > ttft_limit:
            totals[LATE] += 1
        push_finish(replicas, r, replicas.steps[r] + requests.output[i] - 1, i, replicas.running[r])
        replicas.running[r] += 1
    replicas.completing[r] = 0
    while replicas.running[r] and replicas.finish_step[r, 0] <= replicas.steps[r]:
        i = pop_finish(replicas, r, replicas.running[r])
        replicas.running[r] -= 1
        replicas.kv_used[r] -= requests.prompt[i] + requests.output[i]
        replicas.in_flight[r] -= 1
        totals[IN_FLIGHT] -= 1
        requests.last[i] = now
        settle(requests, users, totals, i)
        ended(requests, gateway, totals, releases, i, SERVED, now)


@njit(cache=True)
def simulate(
    requests: Requests,
    users: Users,
    replicas: Replicas,
    engine: Engine,
    gateway: Gateway,
    autoscaler: Autoscaler,
    homes: Array,
    totals: Array,
    scaling: Array,
    releases: tuple[Array, Array],
    histogram: Array,
    order: Array,
    counted_from: float,
    ttft_limit: float,
    late_limit: float,
    seed: int,
) -> float:
    """Runs until every request has ended, or more than `late_limit` came later than `ttft_limit`. Returns the time.

    `order` are the requests that follow no other, by their time. What came before `counted_from` is not counted.
    """
    random.seed(seed)
    nth, now, next_tick = 0, 0.0, 0.0
    while totals[ENDED] < len(requests.arrival) and totals[LATE] <= late_limit:
        sent = requests.arrival[order[nth]] if nth < len(order) else _INFINITE
        released = releases[0][0] if totals[HEAP] > 0 else _INFINITE
        stepped = replicas.until[replicas.order[0]]
        now = min(sent, released, stepped, next_tick)
        if now == next_tick:
            tick(replicas, autoscaler, engine.kv_tokens, totals, scaling, now)
            next_tick += TICK_S
            dispatch(requests, users, replicas, engine, gateway, homes, totals, releases, now, NONE)
        elif now in (sent, released):  # before steps: what comes as one begins is in it
            if sent <= released:
                i = order[nth]
                nth += 1
            else:
                i = pop_release(releases[0], releases[1], totals)
                requests.arrival[i] = now
            if gateway.queue and totals[QUEUED] >= gateway.max_queued:
                refuse(requests, gateway, totals, releases, i, now)
                continue
            join(requests, users, totals, i)
            dispatch(requests, users, replicas, engine, gateway, homes, totals, releases, now, NONE)
        else:
            r = replicas.order[0]
            end_steps(
                requests,
                users,
                replicas,
                engine,
                gateway,
                totals,
                releases,
                histogram,
                counted_from,
                ttft_limit,
                r,
                now,
            )
            dispatch(requests, users, replicas, engine, gateway, homes, totals, releases, now, r)
            start_step(requests, replicas, engine, r, now)
    return now
