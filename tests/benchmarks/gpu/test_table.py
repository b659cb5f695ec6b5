from pathlib import Path

import pytest

from benchmarks.gpu.table import markdown, results
from benchmarks.gpu.versions import judge
from synthia_vllm.bench.run_file import Measurement, Request, Roofline, Run, Server
from synthia_vllm.errors import SetupError

ROOT = Path(__file__).parents[3]


def measured(server: str, number: int, tokens: int) -> Measurement:
    """One stream, one request of a second."""
    chunks = [(at + 1) / tokens for at in range(tokens)]
    request = Request(
        due_s=0, sent_s=0, chunk_s=chunks, done_s=1.0, prompt_tokens=8, wanted_tokens=tokens, output_tokens=tokens
    )
    return Measurement(
        server=server,
        workload="closed loop",
        round=number,
        kind="closed",
        streams=1,
        started_at=0,
        duration_s=1.0,
        requests=[request],
    )


@pytest.fixture
def run() -> Run:
    found = [
        measured("ours", 0, 98),
        measured("vllm", 0, 100),
        measured("ours", 200, 50),
        measured("ours-fp8", 200, 100),
    ]
    roofline = Roofline(
        bandwidth_bytes_s=1e6,
        matrix_flops_s=1e12,
        dtype="bfloat16",
        weight_bytes=8000,
        kv_bytes_per_token=0,
        flops_per_token=1.0,
    )
    servers = [
        Server(name=name, title=name, startup_s=9.0, memory_bytes=2**30) for name in ("ours", "vllm", "ours-fp8")
    ]
    return Run(
        command=[],
        profile="gpu",
        started_at=0,
        commit="",
        machine={},
        versions={},
        options={},
        model={},
        servers=servers,
        measurements=found,
        roofline=roofline,
    )


def test_ratios_are_taken_within_a_stage(run: Run) -> None:
    ratios = results(run, {})["ratios"]
    assert ratios == {"ours / vllm, 1 streams": 0.98, "ours-fp8 / ours, 1 streams": 2.0}


def test_fp8_has_half_the_bytes_to_read(run: Run) -> None:
    bounds = {row["server"]: row["bound"] for row in results(run, {})["rows"]}
    assert bounds == {"ours": 125.0, "vllm": 125.0, "ours-fp8": 250.0}


def test_the_table_has_what_was_measured_and_says_what_was_not(run: Run) -> None:
    text = markdown(results(run, {"ours": 3.0}))
    assert "| tokens/s, ours / vllm, at every number of streams, the least | ≥ 0.98 | 0.98 |" in text
    assert "| tokens/s, ours / card, 64 streams | ≥ 14 | not measured |" in text
    assert "| ours | 9.0 | 1.0 | 3.0 |" in text


def test_the_api_process_is_told_a_token(run: Run) -> None:
    known = [
        found.model_copy(update={"processor_s": 0.0049} if found.server == "ours" and found.round == 0 else {})
        for found in run.measurements
    ]
    rows = results(run.model_copy(update={"measurements": known}), {})["rows"]
    assert {row["server"]: row["processor_us"] for row in rows} == {"ours": 50.0, "vllm": None, "ours-fp8": None}


@pytest.mark.parametrize(
    ("torch", "vllm"), [("2.13.0+cpu", "0.29.0"), ("2.11.0", "0.25.1"), ("2.11.0+cu130", "0.25.1+cu130")]
)
def test_a_pair_that_fits_is_said(torch: str, vllm: str) -> None:
    assert "the one that fits it" in judge(torch, vllm)


@pytest.mark.parametrize("vllm", [None, "0.29.0"])
def test_torch_211_gets_vllm_0251(vllm: str | None) -> None:
    with pytest.raises(SetupError, match=r"pip install vllm==0\.25\.1 .*--find-links"):
        judge("2.11.0", vllm)


def test_a_pair_that_nobody_checked_is_said_to_be_one() -> None:
    assert "not a pair that was checked" in judge("2.14.0", "0.33.0")
