"""`synthia-vllm deploy render`: what is checked in is what it gives, and what contradicts is refused."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from deploy.generate import FOLDER, generated
from synthia_vllm.errors import SetupError
from synthia_vllm.manifests.render import render
from synthia_vllm.secret_urls import reveal
from synthia_vllm.settings import Settings, load_settings

KINDS = ("compose", "helm", "k8s", "ray", "systemd")
SYNTHIA = "migtissera/Synthia-v3.0-11B"
GPU = {"gpus_per_node": 1, "gpu_memory_gib": 48}


def test_what_is_checked_in_is_what_the_settings_give() -> None:
    """`python -m deploy.generate` writes it anew."""
    files = generated()
    assert {name for name, text in files.items() if (FOLDER / name).read_text() != text} == set()


def test_nothing_rendered_lies_about_that_is_rendered_no_more() -> None:
    kept = {"README.md", ".helmignore", "presets", "example.yaml"}
    for folder in ("helm", "kubernetes", "systemd", "proxy", "ray"):
        there = {path for path in (FOLDER / folder).rglob("*") if path.is_file()}
        known = {FOLDER / name for name in generated()}
        assert {path for path in there - known if not kept & set(path.relative_to(FOLDER).parts)} == set()


@pytest.mark.parametrize("kind", KINDS)
def test_no_secret_is_in_what_is_rendered(kind: str) -> None:
    given = Settings(
        access={"secret": "hush-hush", "database": "postgresql+psycopg://me:hush-hush@host/db"},  # type: ignore[arg-type]
        limits={"redis": "redis://host/0"},  # type: ignore[arg-type]
        upstream_key="hush-hush",  # type: ignore[arg-type]
    )
    assert "hush-hush" not in "".join(render(kind, given, []).values())


@pytest.mark.parametrize(
    ("kind", "given", "named"),
    [
        ("k8s", {"deploy": {"grace_period_s": 300}}, ("--cluster.drain-s 600", "--deploy.grace-period-s 300", "630")),
        ("systemd", {"drain_timeout": 90, "deploy": {"grace_period_s": 60}}, ("--drain-timeout 90", "60", "120")),
        ("compose", {"drain_timeout": 90, "deploy": {"grace_period_s": 60}}, ("--drain-timeout 90", "60", "120")),
        (
            "k8s",
            {"model": SYNTHIA, "engine": {"tensor_parallel_size": 4}, "deploy": {"gpus_per_node": 2}},
            ("--engine.tensor-parallel-size 4", "--deploy.gpus-per-node 2", "--cluster.pipeline-parallel-size"),
        ),
        (
            "systemd",
            {"engine": {"tensor_parallel_size": 2}},
            ("--engine.tensor-parallel-size 2", "--deploy.gpus-per-node 0"),
        ),
        (
            "k8s",
            {"model": SYNTHIA, "deploy": {"gpus_per_node": 1, "gpu_memory_gib": 16}},
            ("--deploy.gpu-memory-gib 16", "quantization"),
        ),
        (
            "ray",
            {"model": SYNTHIA, "engine": {"kv_cache_gib": 40}, "deploy": GPU},
            ("--engine.kv-cache-gib 40", "--deploy.gpu-memory-gib 48", "22.2"),
        ),
        (
            "k8s",
            {"engine": {"kv_cache_gib": 20}, "deploy": {"memory_per_node_gib": 8}},
            ("--engine.kv-cache-gib 20", "--deploy.memory-per-node-gib 8"),
        ),
        (
            "k8s",
            {"model": SYNTHIA, "cluster": {"replicas": 3}, "deploy": {**GPU, "nodes": 2}},
            ("--cluster.replicas 3", "--deploy.nodes 2", "give 3 nodes"),
        ),
        (
            "ray",
            {"model": SYNTHIA, "cluster": {"replicas": 2, "surge": True}, "deploy": {**GPU, "nodes": 2}},
            ("--cluster.surge", "--deploy.nodes 2"),
        ),
        (
            "k8s",
            {"model": SYNTHIA, "cluster": {"pipeline_parallel_size": 2}, "deploy": GPU},
            ("--cluster.pipeline-parallel-size 2", "--deploy.nodes 1"),
        ),
        ("k8s", {"host": "0.0.0.0", "access": {"mode": "open"}}, ("--access.mode open", "--insecure")),
    ],
)
def test_what_contradicts_is_refused_with_both_options_and_the_cure(
    kind: str, given: dict[str, Any], named: tuple[str, ...]
) -> None:
    with pytest.raises(SetupError) as refused:
        render(kind, Settings(**given), [])
    for text in named:
        assert text in str(refused.value)


def test_a_replica_takes_the_fewest_gpus_that_hold_the_model() -> None:
    given = Settings(model=SYNTHIA, deploy={"gpus_per_node": 4, "gpu_memory_gib": 24, "nodes": 1})  # type: ignore[arg-type]
    settings = given.model_copy(update={"cluster": given.cluster.model_copy(update={"replicas": 2})})
    assert render("k8s", settings, [])  # two of two GPUs each
    with pytest.raises(SetupError, match="2 fit"):
        render("k8s", settings.model_copy(update={"cluster": given.cluster.model_copy(update={"replicas": 3})}), [])


def test_the_command_writes_what_differs(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "synthia_vllm", "deploy", "render", "systemd", "--to", str(tmp_path)]
    first = subprocess.run([*words, "--drain-timeout", "90"], capture_output=True, text=True, check=True)
    assert "synthia.service" in first.stdout
    assert "TimeoutStopSec=120" in (tmp_path / "systemd" / "synthia.service").read_text()
    again = subprocess.run([*words, "--drain-timeout", "90"], capture_output=True, text=True, check=True)
    assert again.stdout == ""


def test_secrets_come_from_a_folder_and_the_environment_beats_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "access__secret").write_text("from the file\n")
    (tmp_path / "access__database").write_text("sqlite:///from-the-file.db\n")
    (tmp_path / "tls.key").write_text("not a setting")
    monkeypatch.setenv("SYNTHIA_SECRETS", str(tmp_path))
    monkeypatch.setenv("SYNTHIA_ACCESS__DATABASE", "sqlite:///from-the-environment.db")
    settings = load_settings([])
    assert settings.access.secret is not None
    assert settings.access.secret.get_secret_value() == "from the file"
    assert reveal(settings.access.database) == "sqlite:///from-the-environment.db"


def test_a_folder_of_secrets_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SYNTHIA_SECRETS", "/nowhere")
    with pytest.raises(SetupError, match="SYNTHIA_SECRETS /nowhere"):
        load_settings([])
