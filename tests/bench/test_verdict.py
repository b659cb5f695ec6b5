"""What a run is said to have shown: what is behind first, and no more than the rounds bear out."""

import io

import pytest
from rich.console import Console

from synthia_vllm.bench.run_file import Measurement
from synthia_vllm.bench.summary import Summary
from synthia_vllm.bench.terminal import show
from synthia_vllm.bench.verdict import groups, sureness, verdicts, winners
from tests.bench.synthetic import measurement, request, run


def rounds(server: str, *seconds: float, streams: int = 8) -> list[Measurement]:
    """A reply of two tokens a round, which takes so long."""
    return [
        measurement(
            [request(0, value / 2, value)],
            server=server, round=n, streams=streams, workload="closed", duration_s=value,
        )
        for n, value in enumerate(seconds)
    ]  # fmt: skip


SLOW = [2.0 + n / 100 for n in range(5)]
FAST = [1.0 + n / 100 for n in range(5)]


def test_the_peers_that_ours_is_behind_of_come_first() -> None:
    made = run([*rounds("vllm-default", *SLOW), *rounds("llama.cpp", *FAST), *rounds("ours", 1.5, 1.5, 1.5, 1.5, 1.5)])
    found = verdicts(Summary(made))
    assert [one.theirs for one in found] == ["llama.cpp", "vllm-default"]
    assert (len(found[0].behind), len(found[0].ahead)) == (5, 0)
    assert (len(found[1].behind), len(found[1].ahead)) == (0, 5)
    assert found[0].told("behind").startswith("output throughput 0.68 (0.67 to 0.69) times theirs, closed, 8 streams")


def test_what_won_is_said_with_how_much_and_how_sure() -> None:
    summary = Summary(run([*rounds("vllm-default", *SLOW), *rounds("ours", *FAST)]))
    assert winners(summary) == [
        "Ours made most of 2: 2 (2 to 2) tokens a second, closed, 8 streams; 1.98 (1.96 to 2.00) times the next, "
        "Vllm-default."
    ]
    assert "the least and the greatest of fewer than six rounds, no interval" in sureness(verdicts(summary))
    assert "interval that holds" not in sureness(verdicts(summary))


def test_six_rounds_have_an_interval_for_all_figures_together() -> None:
    six = [1.0, 1.01, 0.99, 1.02, 0.98, 1.0]
    summary = Summary(run([*rounds("vllm-default", *(2 * value for value in six)), *rounds("ours", *six)]))
    assert "interval that holds for all 5 together in 99 % of the cases" in sureness(verdicts(summary))
    assert "no interval" not in sureness(verdicts(summary))


def test_the_same_figures_are_level() -> None:
    summary = Summary(run([*rounds("vllm-default", *FAST), *rounds("ours", *FAST)]))
    assert [(len(one.behind), len(one.level), len(one.ahead)) for one in verdicts(summary)] == [(0, 5, 0)]
    assert "are level as the first of 2" in winners(summary)[0]


def test_servers_of_other_groups_are_not_held_against_each_other() -> None:
    made = [measure for name in ("ours", "vllm-tuned", "cluster", "ray-normal", "old", "new")
            for measure in rounds(name, *FAST)]  # fmt: skip
    assert groups(Summary(run(made))) == [["vllm-tuned", "ours"], ["ray-normal", "cluster"], ["old", "new"]]


def test_one_server_has_no_verdict() -> None:
    summary = Summary(run(rounds("server", *FAST)))
    assert (verdicts(summary), winners(summary), sureness(verdicts(summary))) == ([], [], "")


@pytest.mark.parametrize("theirs", [FAST, SLOW])
def test_the_terminal_begins_with_it(theirs: list[float]) -> None:
    out = io.StringIO()
    show(run([*rounds("llama.cpp", *theirs), *rounds("ours", *([1.5] * 5))]), Console(file=out, width=200))
    first = out.getvalue().split("\n")[0]
    assert first.startswith("Ours is behind Llama.cpp: output throughput" if theirs is FAST else "Ours made most of 2")
