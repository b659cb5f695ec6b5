"""Keys for those who measure, made as an operator makes them."""

import os
import subprocess
import sys
from pathlib import Path


def make_key(user: str, *options: str, data: Path | None = None) -> str:
    """Makes a key with `synthia-vllm keys create`; a server that runs knows it within two seconds.

    data   the data folder of its server; without one it is the environment's
    """
    command = [sys.executable, "-m", "synthia_vllm", "keys", "create", "--user", user, *options]
    environment = os.environ if data is None else {**os.environ, "SYNTHIA_DATA": str(data)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()
