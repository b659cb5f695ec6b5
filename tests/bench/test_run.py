"""`synthia-vllm bench run` and its sisters against null engines, as a user runs them."""

import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from synthia_vllm.bench.null.engine import NullEngine
from synthia_vllm.bench.null.faults import Faults
from synthia_vllm.bench.run_file import Run, read
from synthia_vllm.cli import cli
from tests.gateway.live import serving

QUICK = ("--rounds", "1", "--kinds", "closed", "--streams", "4")


def bench(*words: str) -> Result:
    return CliRunner().invoke(cli, ["bench", *words], catch_exceptions=False)


def run_on(folder: Path, servers: dict[str, NullEngine], *words: str) -> tuple[Run, Result]:
    from contextlib import ExitStack

    with ExitStack() as stack:
        ports = {name: stack.enter_context(serving(engine)) for name, engine in servers.items()}
        given = [word for name, port in ports.items() for word in ("--server", f"{name}=http://127.0.0.1:{port}")]
        done = bench("run", *given, *(words or QUICK), "--output", str(folder / "run.json"))
    return read(folder / "run.json"), done


def test_a_run_keeps_every_request_and_what_it_was_made_with(tmp_path: Path) -> None:
    run, done = run_on(tmp_path, {"null": NullEngine(tokens_per_second=500)})
    assert done.exit_code == 0
    (found,) = run.measurements
    assert (found.server, found.streams, len(found.requests)) == ("null", 4, 4)
    assert all(request.error is None and request.output_tokens == 64 for request in found.requests)
    assert run.machine["cpus"] >= 1
    assert run.versions["aiohttp"]
    assert run.options["seed"] == 1


@pytest.mark.parametrize(
    ("faults", "error"),
    [
        (Faults(status=500), "http 500"),
        (Faults(break_after=9), "cut"),
        (Faults(end_after=9), "cut"),
        (Faults(usage_lie=4), "usage"),
    ],
)
def test_a_server_that_is_not_well_shows_as_such(tmp_path: Path, faults: Faults, error: str) -> None:
    run, done = run_on(tmp_path, {"well": NullEngine(), "ill": NullEngine(faults=faults)})
    errors = {found.server: Counter(request.error for request in found.requests) for found in run.measurements}
    assert errors == {"well": {None: 4}, "ill": {error: 4}}
    assert re.search(rf"errors: ill: 4 {error}", done.output)


def test_servers_take_turns_and_none_is_always_first(tmp_path: Path) -> None:
    words = ("--rounds", "2", "--kinds", "closed", "--streams", "1,2")
    run, _ = run_on(tmp_path, {"a": NullEngine(), "b": NullEngine()}, *words)
    assert [(m.round, m.streams, m.server) for m in run.measurements] == [
        (0, 1, "a"), (0, 1, "b"), (0, 2, "a"), (0, 2, "b"),
        (1, 1, "b"), (1, 1, "a"), (1, 2, "b"), (1, 2, "a"),
    ]  # fmt: skip


def test_no_round_is_begun_that_would_not_end_in_time(tmp_path: Path) -> None:
    engine = NullEngine(tokens_per_second=100)
    run, done = run_on(tmp_path, {"null": engine}, *QUICK[2:], "--rounds", "9", "--minutes", "0.76")
    assert 1 <= len(run.measurements) < 5  # 45 s are for stopping: less than a second is left
    assert "of 9 rounds" in done.output


def test_what_was_measured_before_an_interruption_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    with serving(NullEngine(tokens_per_second=300)) as port:
        words = ["bench", "run", "--server", f"http://127.0.0.1:{port}", "--kinds", "closed", "--streams", "4"]
        command = [sys.executable, "-m", "synthia_vllm", *words, "--rounds", "500", "--output", str(path)]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while not (path.exists() and read(path).measurements) and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
    found = read(path).measurements
    assert found
    assert all(len(one.requests) == 4 for one in found)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--server", "http://127.0.0.1:1"), "no answer from http://127.0.0.1:1/v1/models"),
        (("--peers", "ours,theirs"), "no peer 'theirs'"),
        (("--streams", "1,many"), "1,8,32"),
        (("--kinds", "triangular"), "no such workload"),
        (("--trace", "nowhere.csv"), "nowhere.csv can't be read"),
    ],
)
def test_a_wrong_option_is_named(words: tuple[str, ...], said: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(cli, ["bench", "run", *words, "--output", str(tmp_path / "run.json")])
    assert done.exit_code != 0
    assert said in done.output


@pytest.mark.parametrize(("faults", "rate", "fails_at"), [(Faults(), 8, None), (Faults(status=500), None, 1)])
def test_the_slo_search_writes_what_it_found(
    tmp_path: Path, faults: Faults, rate: float | None, fails_at: float | None
) -> None:
    path = tmp_path / "slo.json"
    limits = ("--ttft-ms", "60000", "--itl-ms", "60000", "--start", "4", "--most", "8")
    with serving(NullEngine(faults=faults)) as port:
        given = ("--server", f"http://127.0.0.1:{port}", "--seconds", "1", "--trials", "1")
        done = bench("slo", *given, *limits, "--output", str(path))
    assert done.exit_code == 0, done.output
    slo: Any = read(path).slo
    assert (slo["rate"], slo["fails_at"]) == (rate, fails_at)
    assert {trial["rate"] for trial in slo["trials"]} == ({4, 8} if rate else {4, 2, 1})


def test_light_help() -> None:
    code = "from synthia_vllm.cli import cli; cli(['bench', 'run', '--help'], standalone_mode=False)\n"
    code += "import sys; print([name for name in ('torch', 'vllm', 'ray', 'transformers') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
