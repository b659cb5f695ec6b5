"""One replica of the engine: `ray.serve.llm`'s server, with what the single machine's server does around vLLM.

Checked on Ray 2.60.0 with vLLM 0.29.0; what is used of their insides is the application's state
(`openai_serving_models`, `engine_client`), as vLLM's own middleware uses it.
"""

import asyncio
import os

from synthia_vllm.cluster.cores import leave_busy_cores, make_room, return_to_all_cores, stay_on
from synthia_vllm.engine.plugin import ENGINE_VARIABLE

if os.environ.get(ENGINE_VARIABLE):  # in a replica, not where one is planned; importing vLLM is most of its start
    leave_busy_cores()

from dataclasses import replace
from typing import Any

import ray
from ray import serve
from ray.serve.llm import LLMConfig
from ray.serve.llm.deployment import LLMServer
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.tokenizers import get_tokenizer

from synthia_vllm.cluster.guard import Guard, engine_key
from synthia_vllm.cluster.share import Share, share_of
from synthia_vllm.engine.hardware import inspect_machine
from synthia_vllm.engine.memory import choose_kv_bytes, read_geometry
from synthia_vllm.engine.server import warm_up
from synthia_vllm.engine.tokens import bos_lead
from synthia_vllm.prompt import MODEL_ALIASES
from synthia_vllm.settings import Settings

_BINDING = "VLLM_CPU_OMP_THREADS_BIND"
OWN_CONFIG = "synthia"  # our part of LLMConfig.experimental_configs


class Engine(LLMServer):  # type: ignore[misc]
    """vLLM with the Synthia template, under all of its names, behind a door that only gateways pass."""

    async def __init__(self, llm_config: LLMConfig, **options: Any) -> None:  # type: ignore[misc]
        own = llm_config.experimental_configs[OWN_CONFIG]
        self._settings = Settings(**own["settings"])
        self._names = [own["name"], *(alias for alias in MODEL_ALIASES if alias != own["name"])]
        self._cpus: str | None = None  # of our share, where we have bound the engine to it
        if own["shares_machine"]:
            stay_on(set())  # what the share is of
            self._take_share(llm_config, keep_cache=own["keeps_cache"])
        engine = llm_config.get_engine_config()
        lead = {"bos_lead": bos_lead(get_tokenizer(engine.actual_hf_model_id))}
        given = engine.frontend_kwargs.get("default_chat_template_kwargs") or {}
        engine.frontend_kwargs["default_chat_template_kwargs"] = lead | given
        await super().__init__(llm_config, **options)

    async def __serve_build_asgi_app__(self) -> Any:
        app = await super().__serve_build_asgi_app__()
        models = app.state.openai_serving_models.base_model_paths
        models[:] = [BaseModelPath(name=name, model_path=models[0].model_path) for name in self._names]
        await warm_up(app.state.engine_client)
        return_to_all_cores()
        app.middleware_stack = None  # vLLM has built it already; Starlette builds it again with ours
        app.add_middleware(Guard, key=engine_key(self._settings))
        return app

    async def check_health(self) -> None:
        await super().check_health()
        if self._cpus is not None:
            await asyncio.to_thread(make_room, _cores(self._cpus))

    def _take_share(self, llm_config: LLMConfig, *, keep_cache: bool) -> None:
        """Replicas on one machine without GPUs divide its cores and its memory; else each would plan to use all."""
        share = machine_share(self._settings)
        if os.environ.get(_BINDING, "auto") == "auto":  # a binding that Ray was started with wins
            os.environ[_BINDING] = self._cpus = share.cpus
            stay_on(_cores(share.cpus))
        if keep_cache:
            return
        machine = inspect_machine()
        machine = replace(machine, memory_available=min(machine.memory_available, share.memory))
        engine = self._settings.engine
        geometry = read_geometry(llm_config.get_engine_config().actual_hf_model_id, engine.dtype)
        if geometry is not None:
            context = engine.max_model_len or geometry.context
            cache = choose_kv_bytes(geometry, context, machine, engine.kv_cache_gib)
            llm_config.update_engine_kwargs(kv_cache_memory_bytes=cache)


def _cores(cpus: str) -> set[int]:
    """None for "auto": all."""
    return set() if cpus == "auto" else {int(cpu) for cpu in cpus.split(",")}


def machine_share(settings: Settings) -> Share:
    """This replica's share, by its rank among the replicas of its machine."""
    context = serve.get_replica_context()
    nodes = sum(node["Alive"] and node["Resources"].get("CPU", 0) > 0 for node in ray.nodes())
    return share_of(inspect_machine(), context.rank.local_rank, context.world_size, nodes, settings)
