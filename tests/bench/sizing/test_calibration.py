import random

import numpy as np
import pytest

from synthia_vllm.bench.run_file import Server
from synthia_vllm.bench.sizing.calibration import calibrate, nnls, steps_of
from synthia_vllm.bench.sizing.check import HELD_OUT, check, engine_limits, hold_out
from synthia_vllm.bench.sizing.engine_model import EngineModel
from synthia_vllm.bench.summary import Load
from tests.bench.synthetic import Engine, close, closed, failed, measurement, open_loop, request, run


def engine(seed: int, noise: float = 0.15) -> Engine:
    return Engine(noise=noise, dice=random.Random(seed))


@pytest.fixture(scope="module")
def model() -> EngineModel:
    loads = [closed(n, engine=engine(n)) for n in (1, 8, 32)]
    return calibrate([*loads, *(open_loop(rate, engine=engine(9), requests=250) for rate in (1.0, 3.0, 6.0))])


@pytest.mark.parametrize("sequences", [1, 4, 16, 32])
def test_step_times_come_out_of_the_chunks(model: EngineModel, sequences: int) -> None:
    found = float(model.step_s(np.asarray([float(sequences)]))[0])
    assert close(found, 0.020 + 0.0015 * sequences, 0.05)


def test_the_time_of_a_prompt_token_comes_out(model: EngineModel) -> None:
    assert close(model.prefill_s, 0.0002, 0.3)


def test_the_noise_comes_out(model: EngineModel) -> None:
    assert close(float(np.std(model.noise)), 0.15, 0.15)
    assert np.mean(model.noise) == pytest.approx(1.0)


def test_a_step_counts_those_that_got_a_token_in_it() -> None:
    made = measurement([request(0, 1.0, 2.0, 3.0), request(0, 2.01, 3.01), request(0, 1.0, 1.99)])
    found = steps_of(made)
    assert found is not None
    assert found.sequences.tolist() == [3, 2, 2, 3]
    assert found.prompt_tokens.tolist() == [10, 0, 0, 10]


def test_a_closed_loop_is_used_up_to_where_replies_may_be_missing() -> None:
    """Of two streams, one ended at 3 and its next reply, under way at the end, is not in the file."""
    made = measurement([request(0, 1.0, 2.0, 3.0), request(0, 1.0, 2.0, 3.0, 4.0)], streams=2)
    found = steps_of(made)
    assert found is not None
    assert found.sequences.tolist() == [2, 2, 2, 2]


def test_numbers_of_sequences_that_a_batch_only_passes_are_no_knots() -> None:
    """24 streams start one after the other, a step each, and from then on decode together."""
    made = measurement([request(0, *(1.0 + step for step in range(n, 64))) for n in range(24)])
    knots = set(calibrate([made]).knots)
    assert 24 in knots
    assert not {8, 12, 16} & knots


def test_nothing_to_calibrate_on_is_said() -> None:
    with pytest.raises(ValueError, match="nothing to calibrate on"):
        calibrate([measurement([request(0, 1.0), failed(0, "cut")])])


def test_weights_that_would_be_negative_are_zero() -> None:
    matrix = np.asarray([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]])
    assert nnls(matrix, np.asarray([3.0, 2.0, 1.0])) == pytest.approx([2.0, 0.0])


def test_step_times_go_on_straight_past_what_was_measured() -> None:
    model = EngineModel(knots=(1.0, 2.0), decode_s=(1.0, 1.5), prefill_s=0.0)
    assert model.step_s(np.asarray([1.0, 2.0, 4.0])).tolist() == [1.0, 1.5, 2.5]


def test_the_held_out_loads_lie_between_others() -> None:
    loads = [Load("closed", "closed", n) for n in (1, 8, 32, 64)] + [Load("open", "open", rate=r) for r in (1, 2, 3, 4)]
    held = hold_out(loads)
    assert len(held) == HELD_OUT
    assert not {loads[0], loads[3], loads[4], loads[7]} & set(held)


def test_the_check_predicts_three_loads_it_did_not_see() -> None:
    made = [closed(n, engine=engine(n)) for n in (1, 8, 32)]
    made += [open_loop(rate, engine=engine(int(rate)), requests=250) for rate in (1.0, 2.0, 3.0, 4.0, 5.0)]
    sizing = check(run(made)).sizing
    assert sizing is not None
    held = [row for row in sizing["rows"] if not row["calibrated"]]
    assert len(held) == HELD_OUT
    assert all(abs(error) < 0.15 for row in held for error in row["errors"])


def test_too_few_loads_are_an_error_that_says_what_is_needed() -> None:
    with pytest.raises(ValueError, match="3 loads to predict are needed"):
        check(run([closed(1), closed(8)]))


def test_limits_of_the_engine_come_from_its_command() -> None:
    command = ["serve", "--max-num-seqs", "64", "--kv-cache-memory-bytes=1000000"]
    one = run([closed(1)], servers=[Server(name="ours", title="", command=command)], model={"kv_bytes_per_token": 100})
    assert engine_limits(one, "ours") == {"max_seqs": 64, "max_batched_tokens": 256, "kv_tokens": 10_000}
    assert engine_limits(one, "vllm-default")["max_batched_tokens"] == 2048
