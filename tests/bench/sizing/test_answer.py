from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from synthia_vllm.bench.run_file import read, report_beside, write
from synthia_vllm.bench.sizing.answer import Wanted, size
from synthia_vllm.bench.sizing.command import command
from synthia_vllm.bench.sizing.engine_model import EngineModel
from synthia_vllm.bench.summary import Slo
from tests.bench.synthetic import closed, open_loop, run

MODEL = EngineModel(knots=(1.0, 128.0), decode_s=(0.0215, 0.212), prefill_s=0.0002)


def wanted(rate: float, ttft_s: float = 0.5, itl_s: float = 0.15) -> Wanted:
    return Wanted(10, rate, 100, 60, Slo(ttft_s, itl_s), requests=4000)


def test_the_answer_holds_and_one_less_does_not() -> None:
    answer = size(MODEL, wanted(60))
    held = {trial.replicas: trial.holds for trial in answer.trials}
    assert answer.replicas is not None
    assert held[answer.replicas]
    assert not held[answer.replicas - 1]


def test_a_stricter_slo_needs_no_fewer() -> None:
    loose, strict = size(MODEL, wanted(60)).replicas, size(MODEL, wanted(60, itl_s=0.06)).replicas
    assert loose is not None
    assert strict is not None
    assert strict > loose


def test_a_light_load_needs_one() -> None:
    assert size(MODEL, wanted(0.5)).replicas == 1


def test_an_slo_that_a_request_alone_misses_has_no_answer() -> None:
    assert size(MODEL, wanted(1, ttft_s=0.001)).replicas is None


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = [closed(n) for n in (1, 8)] + [open_loop(rate, requests=40) for rate in (1.0, 2.0, 3.0, 4.0, 5.0)]
    path = tmp_path_factory.mktemp("size") / "run.json.gz"
    write(run(made), path)
    report_beside(path).write_text("the former one")
    return path


ASKED = ["--rate", "20", "--prompt-tokens", "32", "--output-tokens", "64", "--ttft-ms", "500", "--itl-ms", "150"]


@pytest.fixture(scope="module")
def done(file: Path) -> Result:
    return CliRunner().invoke(command, [str(file), *ASKED, "--requests", "2000", "--save"])


def test_the_command_names_the_number(done: Result) -> None:
    assert done.exit_code == 0, done.output
    assert "replicas hold it" in done.output


def test_the_command_saves_its_answer_and_its_check(done: Result, file: Path) -> None:
    sizing = read(file).sizing
    assert sizing is not None
    assert sizing["rows"]
    assert sizing["answer"]["replicas"] > 1


def test_the_answer_is_in_the_report(done: Result, file: Path) -> None:
    assert "replicas for 20 requests a second of 1 users" in report_beside(file).read_text()


def test_the_command_fails_where_nothing_holds(file: Path) -> None:
    asked = [str(file), "--rate", "1", "--ttft-ms", "1", "--requests", "1000"]
    assert CliRunner().invoke(command, asked).exit_code == 1
