from synthia_vllm.bench.summary import Summary
from synthia_vllm.bench.targets import main_family, targets
from tests.bench.synthetic import measurement, request, run


def verdicts(ours: list[int], theirs: list[int]) -> str:
    """Of ours against vLLM as started by default, tokens a second in each round."""
    made = [
        measurement([request(0, *([1.0] * count))], server=server, round=n, streams=64, workload="closed", duration_s=1)
        for server, counts in (("ours", ours), ("vllm-default", theirs))
        for n, count in enumerate(counts)
    ]
    return next(t.verdict for t in targets(Summary(run(made))) if t.theirs == "vllm-default")


def test_a_target_is_met_where_the_whole_interval_is_above_it() -> None:
    assert verdicts([20, 21, 22], [10, 10, 10]) == "met"


def test_a_target_is_missed_where_the_whole_interval_is_below_it() -> None:
    assert verdicts([12, 13, 14], [10, 10, 10]) == "missed"


def test_a_median_on_one_side_is_within_noise_where_the_interval_reaches_to_the_other() -> None:
    assert verdicts([15, 19, 22], [10, 10, 10]) == "met, within noise"
    assert verdicts([15, 17, 22], [10, 10, 10]) == "missed, within noise"


def test_a_pair_that_was_not_measured_is_said() -> None:
    made = [measurement([request(0, 1.0)], server="card", streams=8)]
    assert {target.verdict for target in targets(Summary(run(made)))} == {"not measured"}


def test_a_run_against_no_peer_has_no_targets() -> None:
    assert targets(Summary(run([measurement([request(0, 1.0)], streams=64)]))) == []


def test_peers_are_held_against_each_other_where_most_were_measured() -> None:
    made = [measurement([request(0, 1.0)], server=name, streams=8, workload="closed") for name in ("ours", "card")]
    made.append(measurement([request(0, 1.0)], streams=8, workload="closed, long prompts"))
    assert main_family(Summary(run(made))) == "closed"
