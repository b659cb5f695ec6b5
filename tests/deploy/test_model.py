"""`deploy fetch-model` against a hub of our own on this machine: what arrives is checked, and damage is found."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from synthia_vllm.errors import SetupError
from synthia_vllm.manifests.model import check_sums

_COMMIT = "a" * 40
_WEIGHTS = b"weights" * 1000
_FILES = {"config.json": b"{}", "model.safetensors": _WEIGHTS}


class Hub(BaseHTTPRequestHandler):
    """The two routes of the hub that a download needs. `damaged`: the weights arrive other than announced."""

    damaged = False

    def do_HEAD(self) -> None:
        self._answer(send=False)

    def do_GET(self) -> None:
        self._answer(send=True)

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, *, send: bool) -> None:
        path = self.path.partition("?")[0]
        if "/tree/" in path:
            return self._send(json.dumps(self._tree()).encode(), {"Content-Type": "application/json"}, send=send)
        if path.startswith("/api/models/"):
            return self._send(json.dumps(self._info()).encode(), {"Content-Type": "application/json"}, send=send)
        if path.rpartition("/")[2] not in _FILES or "/some/model/" not in path:
            return self.send_error(404)
        content = _FILES[path.rpartition("/")[2]]
        etag = hashlib.sha256(content).hexdigest() if content is _WEIGHTS else "b" * 40
        if self.damaged and content is _WEIGHTS:
            content = content[::-1]
        return self._send(content, {"ETag": f'"{etag}"', "X-Repo-Commit": _COMMIT}, send=send)

    def _info(self) -> dict[str, Any]:
        siblings: list[dict[str, Any]] = [{"rfilename": name, "size": len(text)} for name, text in _FILES.items()]
        lfs = {"sha256": hashlib.sha256(_WEIGHTS).hexdigest(), "size": len(_WEIGHTS), "pointerSize": 100}
        siblings[1]["lfs"] = lfs
        return {"id": "some/model", "modelId": "some/model", "sha": _COMMIT, "siblings": siblings, "tags": []}

    def _tree(self) -> list[dict[str, Any]]:
        tree = []
        for one in self._info()["siblings"]:
            lfs = {"lfs": {**one["lfs"], "oid": one["lfs"]["sha256"]}} if "lfs" in one else {}
            tree.append({"type": "file", "path": one["rfilename"], "size": one["size"], "oid": "b" * 40, **lfs})
        return tree

    def _send(self, content: bytes, headers: dict[str, str], *, send: bool) -> None:
        self.send_response(200)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if send:
            self.wfile.write(content)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(Hub, "damaged", False)
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def fetch(hub: str, folder: Path, model: str = "some/model") -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "synthia_vllm", "deploy", "fetch-model", model, "--to", str(folder)]
    own = {"HF_ENDPOINT": hub, "HF_HOME": str(folder.parent / "home"), "HF_HUB_DISABLE_XET": "1"}
    return subprocess.run(words, env=os.environ | own, capture_output=True, text=True, check=False)


def test_a_model_arrives_with_its_sums(hub: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    done = fetch(hub, folder)
    assert done.returncode == 0, done.stderr
    assert (folder / "config.json").read_bytes() == b"{}"
    checked = subprocess.run(["sha256sum", "--check", "SHA256SUMS"], cwd=folder, capture_output=True, check=False)
    assert checked.returncode == 0


def test_a_damaged_file_is_refused_and_removed(hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Hub, "damaged", True)
    done = fetch(hub, tmp_path / "model")
    assert done.returncode == 2
    assert "SHA-256" in done.stderr
    assert not (tmp_path / "model" / "SHA256SUMS").exists()
    assert not (tmp_path / "model" / "model.safetensors").exists()


def test_a_start_waits_for_a_model_that_is_still_fetched(hub: str, tmp_path: Path) -> None:
    folder = tmp_path / "models" / "model"
    words = [sys.executable, "-m", "synthia_vllm", "deploy", "await-model", str(folder)]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as waiting:
        try:
            assert waiting.stderr is not None
            assert "0.00 GiB are there; waiting for SHA256SUMS" in waiting.stderr.readline()
            assert fetch(hub, folder).returncode == 0
            assert f"{folder} is there" in waiting.stderr.read()
            assert waiting.wait() == 0
        finally:
            waiting.kill()


def test_a_folder_is_not_whole_while_another_revision_is_fetched(
    hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    assert fetch(hub, folder).returncode == 0
    (folder / "model.safetensors").unlink()
    monkeypatch.setattr(Hub, "damaged", True)
    assert fetch(hub, folder).returncode == 2
    assert not (folder / "SHA256SUMS").exists()


def test_a_model_that_the_hub_does_not_have_is_named(hub: str, tmp_path: Path) -> None:
    done = fetch(hub, tmp_path / "model", "no/model")
    assert done.returncode == 2
    assert "no/model" in done.stderr
    assert "the name right?" in done.stderr


def test_the_first_wrong_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"right")
    (tmp_path / "b").write_bytes(b"wrong")
    sums = {name: hashlib.sha256(b"right").hexdigest() for name in ("a", "b")}
    with pytest.raises(SetupError, match="/b: SHA-256"):
        check_sums(tmp_path, sums)
    assert (tmp_path / "a").exists()
    assert not (tmp_path / "b").exists()
