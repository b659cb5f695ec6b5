"""The servers that a run starts, and those that it can't."""

import sys
from pathlib import Path

import pytest

from synthia_vllm.bench import peers
from synthia_vllm.bench.groups import TITLES
from synthia_vllm.bench.peers import Peer, Plan, machine_group, machine_peers, portable
from synthia_vllm.engine.arguments import EnginePlan

PLAN = Plan("demo", EnginePlan("/cache/models/Small", "Small", ["--model", "/cache/models/Small"]), 1.0, 2)


@pytest.fixture
def said() -> list[str]:
    return []


def test_a_peer_that_is_not_installed_is_left_out_by_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, said: list[str]
) -> None:
    monkeypatch.setattr(peers, "machine_peers", lambda plan: [Peer("llama.cpp", missing="not installed")])
    with machine_group(PLAN, ["llama.cpp"], tmp_path, said.append) as (up,):
        assert up.target is None
        assert up.server.missing == "not installed"
    assert said == ["left out: llama.cpp: not installed"]


def test_a_peer_that_does_not_start_leaves_the_others_running(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, said: list[str]
) -> None:
    null = [sys.executable, "-m", "synthia_vllm.bench.null.engine"]
    broken = [sys.executable, "-c", "import sys; sys.exit('no such model')"]
    found = [Peer("vllm-default", broken), Peer("card", null, path=""), Peer("card-batched", null, path="/batched")]
    monkeypatch.setattr(peers, "machine_peers", lambda plan: found)
    with machine_group(PLAN, [peer.name for peer in found], tmp_path, said.append) as (default, card, batched):
        assert default.server.missing is not None
        assert "no such model" in default.server.missing
        assert card.target is not None
        assert batched.target is not None
        assert batched.target.url == card.target.url + "/batched"  # one process
        assert card.memory is not None
        assert card.memory() > 2**20


def test_all_peers_have_titles_and_those_of_a_foreign_model_no_gguf() -> None:
    found = machine_peers(Plan("/models/other", PLAN.engine, 1.0, 2))
    assert {peer.name for peer in found} <= set(TITLES)
    assert [peer.name for peer in found if peer.missing] == ["llama.cpp"]


@pytest.mark.parametrize(
    ("word", "shown"),
    [
        (sys.executable, "python"),
        ("/cache/models/Small", "Small"),
        ("/usr/lib/libtcmalloc.so.4:/opt/libiomp5.so", "libtcmalloc.so.4:libiomp5.so"),
        ("--max-model-len", "--max-model-len"),
        ("migtissera/Synthia-v3.0-11B", "migtissera/Synthia-v3.0-11B"),
    ],
)
def test_commands_are_told_without_this_machines_folders(word: str, shown: str) -> None:
    assert portable(word, PLAN) == shown
