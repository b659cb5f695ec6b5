"""Imported by the fork server alone, which forks the engine's processes afterwards."""

from synthia_vllm.engine.fork_server import preload

preload()
