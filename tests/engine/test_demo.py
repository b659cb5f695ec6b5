import json
from pathlib import Path

import pytest

from synthia_vllm.engine import demo


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SYNTHIA_CACHE", str(tmp_path))
    return tmp_path


def write_checkpoint(_: Path, target: Path) -> None:
    """A stand-in for the conversion, which takes half a minute."""
    (target / "model.safetensors").write_bytes(b"weights")
    (target / "checksums.json").write_text(
        json.dumps({"model.safetensors": demo._sha256(target / "model.safetensors")})
    )


def test_an_interrupted_conversion_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(gguf: Path, target: Path) -> None:
        (target / "half").write_text("x")
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo.demo_model()
    assert [file.suffix for file in (cache / "models").iterdir()] == [".lock"]


def test_what_a_killed_conversion_left_is_removed(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = cache / "models" / f".{demo.NAME}-killed"
    left.mkdir(parents=True)
    monkeypatch.setattr(demo, "_convert", write_checkpoint)
    assert demo.demo_model().exists()
    assert not left.exists()


def test_the_conversion_is_done_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_convert", write_checkpoint)
    folder = demo.demo_model()
    monkeypatch.setattr(demo, "_convert", None)
    assert demo.demo_model() == folder


def test_a_damaged_model_is_converted_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_convert", write_checkpoint)
    folder = demo.demo_model()
    (folder / "model.safetensors").write_bytes(b"damaged")
    assert (demo.demo_model() / "model.safetensors").read_bytes() == b"weights"
