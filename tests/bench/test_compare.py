from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from synthia_vllm.bench.compare import command, compare
from synthia_vllm.bench.run_file import Measurement, Run, write
from tests.bench.synthetic import failed, measurement, request, run


def rounds(*seconds: float, server: str = "ours", streams: int = 1) -> list[Measurement]:
    """One reply of two tokens a round, which takes so long."""
    return [
        measurement(
            [request(0, value / 2, value)], server=server, round=n, streams=streams, workload="closed", duration_s=value
        )
        for n, value in enumerate(seconds)
    ]


STEADY = (1.00, 1.02, 0.98, 1.01, 0.99)


def invoke(tmp_path: Path, old: Run, new: Run, *options: str) -> Result:
    write(old, tmp_path / "old.json")
    write(new, tmp_path / "new.json")
    return CliRunner().invoke(command, [str(tmp_path / "old.json"), str(tmp_path / "new.json"), *options])


def test_the_same_run_twice_is_no_regression(tmp_path: Path) -> None:
    assert invoke(tmp_path, run(rounds(*STEADY)), run(rounds(*STEADY))).exit_code == 0


def test_twice_as_slow_is_a_regression(tmp_path: Path) -> None:
    done = invoke(tmp_path, run(rounds(*STEADY)), run(rounds(*(2 * value for value in STEADY))))
    assert done.exit_code == 1
    assert "worse" in done.output


def test_twice_as_fast_is_better_and_no_regression(tmp_path: Path) -> None:
    done = invoke(tmp_path, run(rounds(*STEADY)), run(rounds(*(value / 2 for value in STEADY))))
    assert done.exit_code == 0
    assert "better" in done.output


def test_a_change_within_the_noise_is_none() -> None:
    noisy = (0.8, 1.3, 1.0, 0.9, 1.2)
    assert not compare(run(rounds(*noisy)), run(rounds(*(1.08 * value for value in noisy)))).regressions


def test_a_sure_change_within_the_tolerance_is_none() -> None:
    exact = (1.0,) * 5
    new = run(rounds(*(1.04 for _ in exact)))
    assert not compare(run(rounds(*exact)), new, tolerance=0.05).regressions
    assert compare(run(rounds(*exact)), new, tolerance=0.01).regressions


def test_a_single_round_must_be_off_by_far_more() -> None:
    assert not compare(run(rounds(1.0)), run(rounds(1.2))).regressions
    assert compare(run(rounds(1.0)), run(rounds(1.4))).regressions


def test_more_failures_are_a_regression() -> None:
    good, bad = [request(0, 1.0) for _ in range(9)], [request(0, 1.0) for _ in range(8)]
    before = measurement([*good, request(0, 1.0)], streams=1, duration_s=1)
    after = measurement([*bad, failed(0, "cut"), failed(0, "cut")], streams=1, duration_s=1)
    found = compare(run([before]), run([after])).regressions
    assert [change.metric for change in found] == ["failed requests"]


def test_what_only_one_run_has_is_named(tmp_path: Path) -> None:
    old = run([*rounds(*STEADY), *rounds(1.0, server="llama.cpp", streams=8)])
    done = invoke(tmp_path, old, run(rounds(*STEADY)))
    assert "only in the old run: llama.cpp: closed, 8 streams" in done.output
    assert done.exit_code == 0


def test_another_machine_is_said(tmp_path: Path) -> None:
    done = invoke(tmp_path, run(rounds(1.0)), run(rounds(1.0), machine={"cpu": "Another"}))
    assert "machine cpu" in done.output
    assert "Another" in done.output


def test_runs_with_nothing_in_common_are_an_error(tmp_path: Path) -> None:
    done = invoke(tmp_path, run(rounds(1.0)), run(rounds(1.0, server="other")))
    assert done.exit_code == 1
    assert "nothing to compare" in done.output


def test_invalid_measurements_are_not_compared() -> None:
    spoilt = [m.model_copy(update={"invalid": ["late"]}) for m in rounds(9.0, 9.0, 9.0, 9.0, 9.0)]
    late = [m.model_copy(update={"round": 9}) for m in spoilt]
    assert not compare(run(rounds(*STEADY)), run([*rounds(*STEADY), *late])).regressions


def test_a_file_of_something_else_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text("{}")
    done = CliRunner().invoke(command, [str(tmp_path / "old.json")] * 2)
    assert done.exit_code == 1
    assert "old.json is not a result" in done.output


@pytest.mark.parametrize("metric", ["ttft_p50", "itl_p50", "output_throughput"])
def test_each_kind_of_metric_has_its_own_bad_side(metric: str) -> None:
    slower = compare(run(rounds(*STEADY)), run(rounds(*(3 * value for value in STEADY))))
    assert {change.verdict for change in slower.changes if change.metric == metric} == {"worse"}
