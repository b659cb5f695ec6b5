"""The search with a measure that is a formula."""

from collections.abc import Sequence
from typing import Any

from benchmarks.gpu.search import Options, search


def compare_by(goodput: Any, noise: Sequence[float] = (0.0, 0.0, 0.0)) -> Any:
    def compare(best: Options, candidate: Options) -> list[tuple[float, float]]:
        return [(goodput(best), goodput(candidate) + noise[number]) for number in range(len(noise))]

    return compare


def test_options_that_win_are_kept_and_built_upon() -> None:
    def goodput(options: Options) -> float:
        seqs = options.get("max_num_seqs", 256)
        return (
            10.0 + (5 if options.get("quantization") else 0) + (2 if seqs == 512 and options.get("quantization") else 0)
        )

    found = search({"quantization": ("fp8",), "max_num_seqs": (128, 512)}, compare_by(goodput))
    assert found.options == {"quantization": "fp8", "max_num_seqs": 512}
    assert [trial.taken for trial in found.trials] == [True, False, True]


def test_a_gain_within_the_margin_is_left() -> None:
    found = search({"a": (1,)}, compare_by(lambda options: 10.1 if options else 10.0))
    assert found.options == {}


def test_a_gain_that_one_pair_denies_is_left() -> None:
    found = search({"a": (1,)}, compare_by(lambda options: 12.0 if options else 10.0, (0.0, -3.0, 0.0)))
    assert found.options == {}


def test_a_candidate_that_does_not_start_is_left_and_said_so() -> None:
    found = search({"a": (1,)}, lambda best, candidate: [])
    assert found.options == {}
    assert str(found.trials[0]) == "a 1: did not start: left"


def test_where_the_best_never_meets_the_slo_anything_that_does_wins() -> None:
    assert search({"a": (1,)}, compare_by(lambda options: 1.0 if options else 0.0)).options == {"a": 1}


def test_the_best_is_told_after_every_trial() -> None:
    told: list[dict[str, Any]] = []
    goodput = compare_by(lambda options: 10.0 + options.get("a", 0))
    search({"a": (1, 2, 3)}, goodput, done=lambda trial, best: told.append(best))
    assert told == [{"a": 1}, {"a": 2}, {"a": 3}]
