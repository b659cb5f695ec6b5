"""How `synthia-vllm gateway` sets up the pool in front of its engines."""

import pytest

from synthia_vllm.cli.gateway import _pool
from synthia_vllm.settings import load_settings
from tests.cli.test_commands import run


@pytest.mark.parametrize("url", ["engine:8000", "ftp://engine", "http://"])
@pytest.mark.parametrize("command", ["gateway", "exporter"])
def test_a_url_that_is_none_is_told(command: str, url: str) -> None:
    done = run(command, "--upstream", url)
    assert done.returncode == 2
    assert "a URL like http://127.0.0.1:8001" in done.stderr


@pytest.mark.parametrize(
    ("words", "seconds"),
    [
        ([], 60.0),
        (["--fair.max-wait-s", "7"], 7.0),
        (["--fair.max-wait-s", "7", "--replicas.start-wait-s", "600"], 600.0),
    ],
)
def test_who_finds_no_engine_waits_as_long_as_in_the_queue(words: list[str], seconds: float) -> None:
    assert _pool(load_settings(words)).settings.start_wait_s == seconds
