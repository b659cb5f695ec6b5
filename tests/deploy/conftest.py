"""What the tests here share."""

import pytest

from synthia_vllm.settings import CONFIG_VARIABLE


@pytest.fixture(autouse=True)
def no_settings_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """`load_settings(["--config", …])` leaves the file in the environment, for the processes that a server starts."""
    monkeypatch.setenv(CONFIG_VARIABLE, "")
