"""One real cluster for the tests here, started when the first of them needs it, and gone before the next folder."""

import re
from collections.abc import Iterator

import pytest

from tests.ray_cluster import DOWN_TIMEOUT_S, ENGINE_OPTIONS, RunningCluster, run_command


@pytest.fixture(scope="package")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCluster]:
    data = tmp_path_factory.mktemp("cluster") / "data"
    try:
        done = run_command(data, "up", "--port", "0", "--replicas", "2", *ENGINE_OPTIONS)
        found = re.search(r"at (http://\S+)", done.stderr)
        if done.returncode or not found:
            raise RuntimeError(f"cluster up: {done.returncode}\n{done.stdout}{done.stderr}")
        yield RunningCluster(found.group(1), data, done.stderr)
    finally:
        run_command(data, "down", "--now", timeout=DOWN_TIMEOUT_S)
