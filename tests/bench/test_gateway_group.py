"""The gateways before one engine: ours and a reverse proxy that stands for a rival, both real processes."""

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from synthia_vllm.bench import gateway_group, groups, measuring
from synthia_vllm.bench.client import Target
from synthia_vllm.bench.gateway_group import why_no_answer
from synthia_vllm.bench.null.engine import NullEngine
from synthia_vllm.bench.null.faults import Faults
from synthia_vllm.bench.rivals import Rival
from synthia_vllm.bench.run_file import read
from synthia_vllm.cli import cli
from tests.gateway.live import serving


def bench(*words: str) -> Result:
    return CliRunner().invoke(cli, ["bench", "run", *words], catch_exceptions=False)


def stand_ins(monkeypatch: pytest.MonkeyPatch, rivals: Sequence[Rival]) -> None:
    """In the place of others' gateways."""
    group = ("direct", *(rival.name for rival in rivals), "gateway")
    monkeypatch.setitem(groups.GROUPS, "gateways", group)  # type: ignore[misc]
    monkeypatch.setattr(gateway_group, "RIVALS", rivals)
    for rival in rivals:
        monkeypatch.setitem(groups.TITLES, rival.name, rival.title)  # type: ignore[misc]


def test_all_are_measured_and_the_missing_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = Rival(
        "smg", "a reverse proxy", sys.executable,
        lambda engine: ["-m", "tests.bench.passing_on", "--upstream", engine.url],
        "click", environment={"PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    gone = Rival("gone", "one that ends", sys.executable, lambda engine: ["-c", "raise SystemExit('no')"], "click")
    absent = Rival("litellm", "not here", "no-such-program", lambda engine: [], "litellm")
    stand_ins(monkeypatch, (proxy, gone, absent))
    monkeypatch.setattr(measuring, "lateness", lambda requests: [])  # of a machine that is busy
    path = tmp_path / "run.json"
    done = bench("--group", "gateways", "--null", "--streams", "4", "--rounds", "1", "--output", str(path))
    run = read(path)
    missing = {server.name: server.missing for server in run.servers if server.missing}
    assert missing.keys() == {"gone", "litellm"}, done.output
    assert "pip install 'litellm'" in (missing["litellm"] or "")
    found = {one.server: one for one in run.measurements}
    assert found.keys() == {"direct", "smg", "gateway"}
    for one in found.values():
        assert all(request.error is None and request.output_tokens == 64 for request in one.requests)
        assert (one.processor_s is not None) == (one.server != "direct")
        assert one.upstream_processor_s is None  # a null engine's tells nothing
    assert {server.name for server in run.servers if server.memory_bytes} == {"smg", "gateway"}
    assert "where our gateway is behind" in " ".join(done.output.split())
    assert 'id="gateways"' in (tmp_path / "run.html").read_text()


def test_a_gateway_that_answers_no_chat_says_what_it_said() -> None:
    with serving(NullEngine(faults=Faults(status=503))) as port:
        why = why_no_answer(Target(f"http://127.0.0.1:{port}", "null"), within_s=0.0)
    assert why is not None
    assert "http 503" in why


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--null", "--group", "machine"), "of the group gateways alone"),
        (("--rival", "nginx=/usr/sbin/nginx"), "NAME=PROGRAM is wanted"),
        (("--rival", "smg"), "NAME=PROGRAM is wanted"),
        (("--null", "--kinds", "open"), "--kinds open: the profile has no such workload for gateways"),
    ],
)
def test_what_does_not_go_together_is_refused(words: tuple[str, ...], said: str) -> None:
    done = bench(*words)
    assert done.exit_code != 0
    assert said in " ".join(done.output.replace("│", " ").split())
