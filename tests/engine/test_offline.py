"""What `Synthia` refuses before it starts an engine; tests/e2e/test_offline.py has what it does with one."""

import pytest

from synthia_vllm.engine.offline import Synthia
from synthia_vllm.errors import SetupError
from synthia_vllm.settings import EngineSettings


def test_that_its_processes_be_forked_is_refused() -> None:
    with pytest.raises(SetupError, match=r"^engine\.fork: .*leave it out"):
        Synthia("demo", engine=EngineSettings(fork=True))
