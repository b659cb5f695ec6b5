"""Several gateways tell of all of them, each count once: against a real Redis."""

import asyncio
from collections.abc import Iterable
from itertools import count
from typing import Any

import pytest
import redis.asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from synthia_vllm.metrics import series, shared
from synthia_vllm.metrics.cells import Cap, Counts, Histograms, Table, single
from synthia_vllm.metrics.series import Family
from synthia_vllm.metrics.shared import FOLD_S, FRESH_S, SharedMetrics
from synthia_vllm.metrics.snapshot import Snapshot, ToldLabels
from tests.redis_service import RedisServer

WAIT = Family("synthia_queue_wait_seconds", "histogram", ("model",), "Waits.", (0.1, 1.0))


class Gateway:
    """What one counts, and how it shares that."""

    def __init__(self, url: str, clock: Any = None, *, engines: Iterable[str] = ("e",), users: int = 3) -> None:
        self.users = Cap(users)
        self.service = Counts(series.FAIR_SERVICE)
        self.waits = Histograms(WAIT)
        self.running = 0
        self.ledger_up = 1
        more: dict[str, Any] = {"clock": clock} if clock else {}
        self.shared = SharedMetrics(
            url, tuple(engines), self.tables, {"user": self.users, "model": Cap(9, ("synthia",))}, **more
        )

    def tables(self) -> list[Table]:
        up = single(series.LEDGER_UP, self.ledger_up)
        running = Counts(series.REQUESTS_IN_FLIGHT)
        running.cell(self.users.admit("alice")).value = self.running
        return [self.service, self.waits, running, up]

    def count(self, amount: float, user: str = "alice") -> None:
        self.service.cell(self.users.admit(user)).value += amount
        self.waits.cell("synthia").observe(amount)

    async def told(self) -> dict[tuple[str, ...], float]:
        await self.shared.refresh()
        return self.now()

    def now(self) -> dict[tuple[str, ...], float]:
        """All numbers that only grow, by series."""
        tables, found = self.shared.tables, {}
        for labels, cell in tables[series.FAIR_SERVICE.name].cells.items():  # type: ignore[attr-defined]
            found["service", *labels] = cell.value
        for labels, cell in tables[WAIT.name].cells.items():  # type: ignore[attr-defined]
            found |= {("wait", *labels, str(place)): number for place, number in enumerate((*cell.counts, cell.sum))}
        return found

    def gauge(self, family: Family) -> float:
        return sum(cell.value for cell in self.shared.tables[family.name].cells.values())  # type: ignore[attr-defined]


def service(told: dict[tuple[str, ...], float]) -> float:
    return sum(value for name, value in told.items() if name[0] == "service")


async def test_each_tells_of_all_and_each_count_once(redis_url: str) -> None:
    gateways = [Gateway(redis_url) for _ in range(3)]
    for number, one in enumerate(gateways, 1):
        one.count(number)
        one.running = number
        await one.shared.refresh()
    for one in gateways:
        told = await one.told()
        assert told["service", "alice"] == 6
        assert [told["wait", "synthia", place] for place in ("0", "1", "2", "3")] == [0, 1, 2, 6]
        assert (one.shared.gateways, one.gauge(series.REQUESTS_IN_FLIGHT)) == (3, 6)
    gateways[1].ledger_up = 0
    await gateways[1].told()
    await gateways[0].told()
    assert gateways[0].gauge(series.LEDGER_UP) == 0  # the least, and no sum


async def test_who_is_killed_stays_in_the_sums_and_leaves_the_gauges(redis_url: str) -> None:
    now = 0.0
    one, killed = (Gateway(redis_url, lambda: now) for _ in range(2))
    one.count(1)
    killed.count(10)
    killed.running = 5
    for each in (killed, one):
        await each.shared.refresh()
    assert (service(one.now()), one.gauge(series.REQUESTS_IN_FLIGHT), one.shared.gateways) == (11, 5, 2)
    now += FRESH_S + 0.1
    assert service(await one.told()) == 11
    assert (one.gauge(series.REQUESTS_IN_FLIGHT), one.shared.gateways) == (0, 1)
    now += FOLD_S
    await one.shared.step()
    assert service(await one.told()) == 11
    async with redis.asyncio.Redis.from_url(redis_url) as client:
        (told,) = [key async for key in client.scan_iter("*", _type="hash") if not key.endswith(b"numbers")]
        assert await client.hlen(told) == 2  # this one, and all that are gone
    # It only stood still: what it had told is not told again.
    killed.count(100)
    assert service(await killed.told()) == 111
    assert service(await one.told()) == 111
    assert one.shared.gateways == 2


async def test_who_ends_leaves_at_once_and_is_folded_with_the_next_step(redis_url: str) -> None:
    one, other = Gateway(redis_url), Gateway(redis_url)
    async with one.shared:
        async with other.shared:
            other.count(7)
            other.running = 1
        await one.told()
        assert (one.shared.gateways, one.gauge(series.REQUESTS_IN_FLIGHT)) == (1, 0)
        await one.shared.step()
        assert service(await one.told()) == 7


async def test_gateways_before_other_engines_are_told_apart_and_one_in_common_is_enough(redis_url: str) -> None:
    a, b, both = (Gateway(redis_url, engines=engines) for engines in ("a", "b", "ca"))
    for number, one in enumerate((a, b, both)):
        one.count(10**number)
        await one.shared.refresh()
    assert [service(await one.told()) for one in (a, b, both)] == [101, 10, 101]


async def test_names_are_bounded_for_all_gateways_together(redis_url: str) -> None:
    one, other = (Gateway(redis_url, users=3) for _ in range(2))
    for user in ("alice", "bob"):
        one.count(1, user)
    await one.told()
    for user in ("carol", "dave"):
        other.count(10, user)
    for told in (await other.told(), await one.told()):
        assert {name[1]: value for name, value in told.items() if name[0] == "service"} == {
            **{"alice": 1, "bob": 1, "carol": 10},
            "other": 10,
        }


async def test_while_redis_is_gone_the_others_last_sums_stand_and_it_gets_them_back(
    redis_server: RedisServer, redis_url: str
) -> None:
    now = 0.0
    one, other, gone = (Gateway(redis_url, lambda: now) for _ in range(3))
    for number, each in enumerate((gone, other, one)):
        each.count(10**number, f"user{number}")
        each.running = 1
        await each.shared.refresh()
    assert service(await other.told()) == 111
    now += FRESH_S + FOLD_S
    await other.shared.refresh()
    await one.shared.step()
    now += FOLD_S / 2
    for each in (one, other):
        await each.shared.refresh()
    redis_server.stop()
    try:
        one.count(1000)
        assert service(await one.told()) == 1111
        assert one.shared.gateways == 1
        other.count(5000)
    finally:
        redis_server.start()
    assert service(await one.told()) == 1111  # asked again by `step` only
    for _ in range(2):
        await one.shared.step()  # an empty Redis: it is given what there was
        await other.shared.step()
    assert service(await one.told()) == 6111
    assert service(await other.told()) == 6111
    assert one.shared.gateways == 2


async def test_a_redis_that_takes_nothing_is_told_of_once(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(shared._log, "error", lambda event, **_: lines.append(event))
    monkeypatch.setattr(shared._log, "warning", lambda event, **_: lines.append(event))
    one = Gateway(redis_url)
    one.count(1)
    await one.told()
    async with redis.asyncio.Redis.from_url(redis_url) as client:
        await client.config_set("maxmemory", "1")
        try:
            one.count(10)
            for _ in range(3):
                await one.shared.step()
            assert service(await one.told()) == 11
        finally:
            await client.config_set("maxmemory", "0")
    await one.shared.step()
    assert service(await one.told()) == 11
    assert lines == ["metrics_not_shared", "metrics_shared_again"]


async def test_two_that_fold_at_once_count_the_one_that_is_gone_once(redis_url: str) -> None:
    now = 0.0
    gateways = [Gateway(redis_url, lambda: now) for _ in range(6)]
    for number, one in enumerate(gateways):
        one.count(10**number)
        await one.shared.refresh()
    living = gateways[:3]
    for one in living:
        await one.shared.refresh()
    now += FOLD_S + 1
    await asyncio.gather(*(one.shared.refresh() for one in living))
    await asyncio.gather(*(one.shared.step() for one in living))
    assert [service(await one.told()) for one in living] == [111111] * 3


async def test_who_folds_by_what_is_no_longer_so_changes_nothing(redis_url: str) -> None:
    """Another one has folded meanwhile, or the one that was gone is back."""
    now = 0.0
    late, quick, first, second, back = (Gateway(redis_url, lambda: now) for _ in range(5))
    for number, one in enumerate((first, second, back)):
        one.count(10**number)
        await one.shared.refresh()
    for one in (late, quick):
        await one.shared.refresh()
    now += FOLD_S + 1
    for one in (late, quick):
        await one.shared.refresh()
    await quick.shared._fold(first.shared._id)
    await late.shared._fold(second.shared._id)  # into a sum without the first one
    back.count(1000)
    await back.shared.refresh()
    await quick.shared._fold(back.shared._id)  # without what it has published since
    assert [service(await one.told()) for one in (late, quick, back)] == [1111] * 3


async def test_what_redis_did_not_acknowledge_is_counted_once(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its answer is lost, and the gateway is folded before it asks again."""
    now = 0.0
    one, other = Gateway(redis_url, lambda: now), Gateway(redis_url, lambda: now)
    await other.told()
    one.count(1)
    await one.told()
    ask = one.shared._ask

    async def unanswered(operation: str, *words: Any) -> Any:
        await ask(operation, *words)
        if operation == "publish":
            raise TimeoutError

    one.count(10)
    monkeypatch.setattr(one.shared, "_ask", unanswered)
    await one.told()
    assert service(await other.told()) == 11
    now += FOLD_S + 1
    await other.shared.step()
    assert service(await other.told()) == 11
    one.count(100)
    monkeypatch.setattr(one.shared, "_ask", ask)
    await one.shared.step()
    assert [service(await each.told()) for each in (one, other)] == [111, 111]


async def test_a_snapshot_is_exact_however_large_and_in_whatever_order() -> None:
    tables = []
    for value in (1e18, 0.1, 1e-3, 3e17):
        counts = Counts(series.FAIR_SERVICE)
        counts.cell("alice").value = value
        tables.append(counts)
    sums = []
    for order in (tables, tables[::-1]):
        total = Snapshot()
        for table in order:
            told = await Snapshot.of([table], ToldLabels(lambda _, name: name))
            await total.add(await Snapshot.decode(await told.encode()))
        sums.append(await total.encode())
    assert sums[0] == sums[1]


ACTS = st.lists(
    st.tuples(
        st.sampled_from(["count", "count", "told", "told", "step", "kill", "kill quietly", "sleep", "all at once"]),
        st.integers(0, 3),
        st.floats(0.001, 1e6),
    ),
    max_size=40,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(acts=ACTS)
def test_no_answer_is_behind_another_whatever_happens(redis_url: str, acts: list[tuple[str, int, float]]) -> None:
    """Any order of counting, publishing, asking, dying, standing still and coming back."""
    asyncio.run(_run(redis_url, acts))


_runs = count()


async def _run(url: str, acts: list[tuple[str, int, float]]) -> None:
    now, engine = 0.0, f"engine{next(_runs)}"

    def start() -> Gateway:
        return Gateway(url, lambda: now, engines=[engine])

    gateways = [start() for _ in range(4)]
    started = list(gateways)
    counted, lost = 0.0, 0.0
    last: dict[tuple[str, ...], float] = {}
    unpublished = dict.fromkeys(gateways, 0.0)

    async def asked(one: Gateway) -> None:
        nonlocal last
        told = await one.told()
        unpublished[one] = 0.0
        assert all(told.get(name, 0.0) >= value for name, value in last.items())
        last = told

    for act, number, amount in acts:
        one = gateways[number]
        if act == "count":
            one.count(amount, f"user{int(amount) % 5}")
            counted += amount
            unpublished[one] += amount
        elif act == "told":
            await asked(one)
        elif act == "step":
            await one.shared.step()
            unpublished[one] = 0.0
        elif act == "sleep":  # all that do nothing meanwhile stand still
            now += amount % (2 * FOLD_S)
        elif act == "all at once":
            await asyncio.gather(*(each.shared.step() for each in gateways))
            unpublished = dict.fromkeys(gateways, 0.0)
        else:
            if act == "kill":
                await one.shared.__aexit__()
            else:
                lost += unpublished[one]
            gateways[number] = start()
            started.append(gateways[number])
            unpublished[gateways[number]] = 0.0
    for one in gateways:
        await one.shared.step()
    for one in gateways:
        await asked(one)
    assert service(last) == pytest.approx(counted - lost, abs=1e-3)
    names = {name[1] for name in last if name[0] == "service"}
    assert len(names - {"other"}) <= 3
    for one in started:
        await one.shared._redis.aclose()
