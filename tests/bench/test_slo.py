"""The search for the rate at which an SLO breaks."""

import pytest

from synthia_vllm.bench.measuring import quantile
from synthia_vllm.bench.run_file import Measurement, Request
from synthia_vllm.bench.slo import Search, bisect


@pytest.mark.parametrize("start", [0.5, 7.0, 300.0])
async def test_it_closes_in_on_the_edge_from_anywhere(start: float) -> None:
    asked: list[float] = []

    async def holds(rate: float) -> bool:
        asked.append(rate)
        return rate <= 23.0

    low, high = await bisect(holds, start, 0.05, 0.01, 1000)
    assert low is not None
    assert high is not None
    assert low <= 23.0 < high <= low * 1.05
    assert len(asked) < 20


async def test_it_says_so_where_nothing_holds_and_where_everything_does() -> None:
    async def never(rate: float) -> bool:
        return False

    async def always(rate: float) -> bool:
        return True

    assert await bisect(never, 4, 0.1, 0.5, 100) == (None, 0.5)
    assert await bisect(always, 4, 0.1, 0.5, 100) == (100, None)


def measurement(ttft: float, *, error: str | None = None, invalid: bool = False) -> Measurement:
    requests = [Request(due_s=0, sent_s=0, chunk_s=[ttft, ttft + 0.01], done_s=1, error=error)] * 3
    return Measurement(
        server="s", workload="w", round=0, kind="open", started_at=0, duration_s=1, requests=requests,
        invalid=["late"] if invalid else [],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("found", "holds"),
    [
        ([measurement(0.1), measurement(0.1)], True),
        ([measurement(0.1), measurement(9), measurement(0.1)], True),
        ([measurement(9), measurement(0.1), measurement(9)], False),
        ([measurement(0.1, error="cut"), measurement(0.1, error="cut")], False),
        ([measurement(9, invalid=True), measurement(0.1), measurement(0.1)], True),
    ],
)
async def test_most_trials_decide_and_late_clients_do_not_count(found: list[Measurement], holds: bool) -> None:
    async def run(rate: float, number: int) -> Measurement:
        return found[number]

    search = Search(run, 1000, 250, 3, lambda text: None)
    assert await search.holds(1.0) is holds
    assert len(search.trials) == len(found)


def test_quantiles_are_numpys() -> None:
    import numpy as np

    values = [5.0, 1.0, 9.0, 2.0, 7.0]
    assert [quantile(values, share) for share in (0.0, 0.5, 0.99, 1.0)] == pytest.approx(
        list(np.quantile(values, (0, 0.5, 0.99, 1)))
    )
