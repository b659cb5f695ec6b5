from synthia_vllm.metrics.growth import Growth, Totals


def totals(queries: float, hits: float, preemptions: float | None = 0.0) -> Totals:
    return {"prefix_cache_queries": queries, "prefix_cache_hits": hits, "preemptions": preemptions}


def test_what_engines_had_counted_before_is_not_of_now() -> None:
    growth = Growth()
    growth.since({"a": totals(1000, 900)})
    assert growth.since({"a": totals(1100, 950, 2), "b": totals(5000, 0)}) == totals(100, 50, 2)


def test_one_that_is_gone_takes_nothing_away() -> None:
    growth = Growth()
    growth.since({"a": totals(10, 5), "b": totals(100, 50)})
    assert growth.since({"a": totals(30, 15)}) == totals(20, 10)


def test_what_no_engine_tells_is_unknown() -> None:
    growth = Growth()
    assert set(growth.since({}).values()) == {None}
    growth.since({"a": totals(10, 5, None)})
    assert growth.since({"a": totals(10, 5, None)}) == totals(0, 0, None)
