"""Without a server: the batch command and the Python class. Each starts an engine of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e

SMALL = "engine: {max_model_len: 1024, kv_cache_gib: 0.5}\n"
EXAMPLE = Path(__file__).parents[2] / "examples" / "offline.py"
SCRIPT = f"""
import runpy

if __name__ == "__main__":
    synthia = runpy.run_path({str(EXAMPLE)!r}, run_name="__main__")["synthia"]
    orca = [{{"role": "user", "content": "What is an orca?"}}]
    one = synthia.chat(orca, max_tokens=8)
    two = synthia.chat([orca, orca], system="tot", max_tokens=8)
    text = synthia.generate("USER: What is an orca?\\nASSISTANT:", max_tokens=8, ignore_eos=True)
    assert isinstance(one, str) and one == one.strip()
    assert len(two) == 2
    assert text and "USER:" not in text
    print("offline works")
"""


def test_batch_runs_and_goes_on(tmp_path: Path) -> None:
    source, target, config = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "synthia.yaml"
    config.write_text(SMALL)
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8}
    lines = [{"custom_id": f"r{i}", "method": "POST", "url": "/v1/chat/completions", "body": body} for i in range(6)]
    lines[5] = {**lines[5], "body": {**body, "max_tokens": -1}}
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    target.write_text(json.dumps({"custom_id": "r0"}) + "\n" + '{"custom_id": "r1", "cut')
    command = [sys.executable, "-m", "synthia_vllm", "batch", str(source), str(target), "--config", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1, done.stderr
    assert "1 done before" in done.stderr
    results = {result["custom_id"]: result for result in map(json.loads, target.read_text().splitlines())}
    assert results.keys() == {f"r{i}" for i in range(6)}
    assert [results[f"r{i}"]["response"]["status_code"] for i in range(1, 6)] == [200, 200, 200, 200, 400]
    again = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert again.returncode == 0
    assert "6 done before" in again.stderr


def test_synthia_in_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """First the example, as it is; then more, of the engine that it has started."""
    monkeypatch.setenv("SYNTHIA_ENGINE__MAX_MODEL_LEN", "1024")
    monkeypatch.setenv("SYNTHIA_ENGINE__KV_CACHE_GIB", "0.5")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "offline works" in done.stdout
