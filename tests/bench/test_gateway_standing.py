"""Where our gateway is behind its rivals: what counts, how sure it is, and that it is said first."""

import io

import pytest
from rich.console import Console

from synthia_vllm.bench.gateway_standing import Behind, behind, compared, figures
from synthia_vllm.bench.report import render
from synthia_vllm.bench.run_file import Measurement, Run, Server
from synthia_vllm.bench.summary import Summary
from synthia_vllm.bench.terminal import show
from tests.bench.synthetic import closed, measurement, request, run

MEMORY = {"gateway": 100, "smg": 50}


def at(server: str, ttft: float, processor: float | None, upstream: float | None = 1e-3, round: int = 0) -> Measurement:
    """Two replies of two tokens."""
    replies = [request(0.0, ttft, 1.0), request(0.0, ttft, 1.0)]
    used = {"processor_s": processor, "upstream_processor_s": upstream}
    return measurement(replies, server=server, streams=2, workload="chats", round=round, **used)


def a_run(*made: Measurement) -> Run:
    servers = [
        Server(name=name, title=name, memory_bytes=MEMORY[name] * 10**6 if name in MEMORY else None)
        for name in dict.fromkeys(found.server for found in made)
    ]
    return run(made, servers=servers)


@pytest.fixture(scope="module")
def lost() -> Run:
    """Three rounds: ours adds 10 ms and takes 100 µs a token, smg 4 ms and 25 µs; litellm 30 ms and 400 µs."""
    made = []
    for number in range(3):
        made += [
            at("direct", 0.1 + number / 100, None, round=number),
            at("gateway", 0.11 + number / 100, 4e-4, 5e-4, round=number),
            at("smg", 0.104 + number / 100, 1e-4, round=number),
            at("litellm", 0.13 + number / 100, 16e-4, round=number),
        ]
    return a_run(*made)


def told(found: Run) -> dict[str, str]:
    return {one.figure.title: one.words() for one in behind(Summary(found))}


def test_added_ttft_and_cost_are_of_the_same_round_and_token(lost: Run) -> None:
    heads, rows = figures(Summary(lost))
    row = dict(zip(heads, next(row for row in rows if row[1] == "gateway"), strict=True))
    assert row["added TTFT p50, ms"].startswith("10.00 ")
    assert row["processor, µs a token"].startswith("100.0 ")
    assert row["with the engine's API process"].startswith("225.0 ")
    assert row["memory, MB"] == "100"


def test_only_who_does_better_is_named(lost: Run) -> None:
    assert told(lost)["added TTFT p50, ms"] == "smg 4.00"
    assert told(lost)["processor, µs a token"] == "smg 25.0"
    assert told(lost)["memory, MB"] == "smg 50"


def test_work_that_is_left_to_the_engine_counts_there(lost: Run) -> None:
    assert "smg 275.0" not in told(lost).get("with the engine's API process", "")


def test_nothing_is_told_of_the_engine_itself(lost: Run) -> None:
    assert compared(Summary(lost)) == ["smg", "litellm"]
    assert not any("direct" in words for words in told(lost).values())


def test_what_is_not_so_in_every_round_is_not_sure() -> None:
    made = [at("direct", 0.1, None, round=number) for number in range(3)]
    made += [at("gateway", 0.12, 4e-4, round=number) for number in range(3)]
    made += [at("smg", 0.11 if number else 0.13, 4e-4, round=number) for number in range(3)]
    assert told(a_run(*made))["added TTFT p50, ms"] == "smg 10.00 (within noise)"


def test_one_round_is_called_that() -> None:
    found = a_run(at("direct", 0.1, None), at("gateway", 0.12, 4e-4), at("smg", 0.11, 4e-4))
    assert told(found)["added TTFT p50, ms"] == "smg 10.00 (one round)"


def test_without_the_direct_engine_no_latency_is_added() -> None:
    found = a_run(at("gateway", 0.12, 4e-4, None), at("smg", 0.11, 4e-4, None))
    heads, _ = figures(Summary(found))
    assert "added TTFT p50, ms" not in heads
    assert "with the engine's API process" not in heads  # a null engine's


def printed(found: Run) -> str:
    console = Console(file=io.StringIO(), width=160)
    show(found, console)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


def test_the_terminal_says_first_where_we_are_behind(lost: Run) -> None:
    text = printed(lost)
    assert text.index("is behind") < text.index("gateways before one engine") < text.index("medians over the rounds")
    assert "smg 25.0" in text[: text.index("gateways before one engine")]


def test_the_report_says_so_before_all_else(lost: Run) -> None:
    html = render(lost)
    assert html.index('id="gateways"') < html.index("Where it is behind") < html.index('id="wrong"')
    assert "smg 25.0" in html


def test_being_behind_nobody_is_said_too() -> None:
    found = a_run(at("direct", 0.1, None), at("gateway", 0.11, 1e-4), at("litellm", 0.13, 9e-4))
    assert "Behind litellm in no figure" in render(found)
    assert "not litellm" in printed(found)


def test_a_run_without_gateways_tells_nothing_of_them() -> None:
    assert 'id="gateways"' not in render(run([closed(1)]))


def test_a_line_has_its_load(lost: Run) -> None:
    first: Behind = behind(Summary(lost))[0]
    assert first.where == "chats, 2 streams"
