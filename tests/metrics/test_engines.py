import random
from collections import Counter

from synthia_vllm.metrics.engines import EnginePage, Gone
from synthia_vllm.metrics.exposition import Block


def page(tokens: float, *, model: str = "m", started: float = 1.0, running: int = 0) -> str:
    return (
        "# HELP process_start_time_seconds S.\n# TYPE process_start_time_seconds gauge\n"
        f"process_start_time_seconds {started}\n"
        "# HELP vllm:tokens_total T.\n# TYPE vllm:tokens_total counter\n"
        f'vllm:tokens_total{{model_name="{model}"}} {tokens}\n'
        "# HELP vllm:running R.\n# TYPE vllm:running gauge\n"
        f"vllm:running {running}\n"
        "# HELP http_requests_total H.\n# TYPE http_requests_total counter\nhttp_requests_total 5\n"
    )


def told(lines: list[tuple[Block, str]]) -> dict[str, float]:
    text = "".join(line for _, line in lines)
    return {key: float(value) for key, _, value in (line.rpartition(" ") for line in text.splitlines())}


def one(page_: EnginePage) -> dict[str, float]:
    return told(list(page_.lines()))


def test_the_engines_own_series_get_its_name() -> None:
    engine = EnginePage("r1")
    engine.update(page(5, running=2))
    assert one(engine) == {'vllm:tokens_total{replica="r1",model_name="m"}': 5, 'vllm:running{replica="r1"}': 2}
    assert engine.value("vllm:running") == 2
    assert engine.value("vllm:nothing") is None


def test_a_lost_engines_counters_stand_and_its_gauges_go() -> None:
    engine = EnginePage("r1")
    engine.update(page(5, running=2))
    engine.lose()
    assert one(engine) == {'vllm:tokens_total{replica="r1",model_name="m"}': 5}
    engine.update(page(7, running=1))
    assert one(engine)['vllm:tokens_total{replica="r1",model_name="m"}'] == 7


def test_a_process_that_starts_anew_goes_on_where_the_old_one_stopped() -> None:
    engine = EnginePage("r1")
    engine.update(page(100))
    engine.update(page(10, started=2.0))
    key = 'vllm:tokens_total{replica="r1",model_name="m"}'
    assert one(engine)[key] == 110
    engine.update(page(12, started=2.0))
    assert one(engine)[key] == 112
    # Faster than the old one ever was: only the start tells.
    engine.update(page(500, started=3.0))
    assert one(engine)[key] == 612
    # A model that the new process has not served yet is not forgotten.
    engine.update(page(1, model="other", started=4.0))
    assert one(engine)[key] == 612
    assert one(engine)['vllm:tokens_total{replica="r1",model_name="other"}'] == 1


def test_the_sum_over_all_never_falls_and_no_series_jumps() -> None:
    """Replicas come and go at random, fifty of them; also after the most that are kept apart are gone."""
    dice = random.Random(5)
    gone, engines, count = Gone(most=4), {}, Counter[str]()
    names = iter(range(1000))
    before: dict[str, float] = {}
    for step in range(500):
        while len(engines) < 3:
            name = f"r{next(names)}"
            engines[name] = EnginePage(name)
        for name, engine in engines.items():
            count[name] += dice.randrange(10)
            engine.update(page(count[name]))
        lost = dice.choice(list(engines)) if dice.random() < 0.1 else None
        if lost:
            gone.add(lost, engines.pop(lost))
        lines = [line for engine in engines.values() for line in engine.lines()] + list(gone.lines())
        now = {key: value for key, value in told(lines).items() if "tokens" in key}
        assert sum(now.values()) == count.total(), step
        assert len(now) <= 3 + 4 + 1
        for key, value in now.items():
            # What is there already moves by what was counted in this step; what is born may have any value.
            assert key not in before or 0 <= value - before[key] < 10
        before = now
    assert len(count) > 20


def test_one_that_comes_back_goes_on() -> None:
    gone, engine = Gone(), EnginePage("r1")
    engine.update(page(5))
    gone.add("r1", engine)
    assert told(list(gone.lines())) == {'vllm:tokens_total{replica="r1",model_name="m"}': 5}
    back = gone.take_back("r1")
    assert back is engine
    assert not list(gone.lines())
    back.update(page(2, started=9.0))
    assert one(back)['vllm:tokens_total{replica="r1",model_name="m"}'] == 7
