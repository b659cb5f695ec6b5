"""Null engines for the faults: real processes, no model."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from synthia_vllm.bench.replica_set import ReplicaSet
from tests.chaos.house import REPLICAS, TOKENS_PER_SECOND

PACE = ["--tokens-per-second", str(TOKENS_PER_SECOND)]


@pytest.fixture(autouse=True)
def own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SYNTHIA_DATA", str(tmp_path / "data"))


@pytest.fixture
def replicas() -> Iterator[ReplicaSet]:
    with ReplicaSet(REPLICAS, options=PACE, restart_s=0.5, notice_s=1.0) as found:
        found.wait()
        yield found
