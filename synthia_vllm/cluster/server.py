"""One replica of the engine: `ray.serve.llm`'s server, with what the single machine's server does around vLLM.

Checked on Ray 2.60.0 with vLLM 0.29.0; what is used of their insides is the application's state
(`openai_serving_models`, `engine_client`), as vLLM's own middleware uses it.
"""

import asyncio
import os

from synthia_vllm.cluster.cpus.claims import CAN_BIND, Claims, bind, share_cores, start_on_free_cores
from synthia_vllm.engine.hardware import CPU_BINDING, inspect_machine

if os.environ.get(CPU_BINDING) == "auto":  # before vLLM is imported, which is most of a start
    start_on_free_cores(Claims())

from dataclasses import replace
from functools import partial
from typing import Any

import ray
from ray import serve
from ray.serve.llm import LLMConfig
from ray.serve.llm.deployment import LLMServer
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.tokenizers import get_tokenizer

from synthia_vllm.api import abort
from synthia_vllm.cluster.aborts import Aborts
from synthia_vllm.cluster.cpus.share import Share, share_of
from synthia_vllm.cluster.guard import Guard, engine_key
from synthia_vllm.engine.arguments import CPU_WORKER, DEMO, default_model
from synthia_vllm.engine.memory import choose_kv_bytes, read_geometry
from synthia_vllm.engine.server import warm_up
from synthia_vllm.engine.tokenizer import Tokenizer
from synthia_vllm.prompt import MODEL_ALIASES
from synthia_vllm.settings import Settings
from synthia_vllm.supervise import supervise

# Set for replicas on a CPU; a binding that Ray was started with wins.
_SHARES_CORES = CAN_BIND and os.environ.get(CPU_BINDING) == "auto"
OWN_CONFIG = "synthia"  # our part of LLMConfig.experimental_configs


class Engine(LLMServer):  # type: ignore[misc]
    """vLLM with the Synthia template, under all of its names, behind a door that only gateways pass."""

    async def __init__(self, llm_config: LLMConfig, **options: Any) -> None:  # type: ignore[misc]
        own = llm_config.experimental_configs[OWN_CONFIG]
        self._settings = Settings(**own["settings"])
        self._names = [own["name"], *(alias for alias in MODEL_ALIASES if alias != own["name"])]
        self._watch: asyncio.Task[None] | None = None
        self._base: list[int] = []  # the CPUs that its engine was started on
        if own["shares_machine"]:
            self._take_share(llm_config, keep_cache=own["keeps_cache"])
        engine = llm_config.get_engine_config()
        lead = {"bos_lead": Tokenizer.of(get_tokenizer(engine.actual_hf_model_id)).lead}
        given = engine.frontend_kwargs.get("default_chat_template_kwargs") or {}
        engine.frontend_kwargs["default_chat_template_kwargs"] = lead | given
        await super().__init__(llm_config, **options)

    async def __serve_build_asgi_app__(self) -> Any:
        app = await super().__serve_build_asgi_app__()
        models = app.state.openai_serving_models.base_model_paths
        models[:] = [BaseModelPath(name=name, model_path=models[0].model_path) for name in self._names]
        await warm_up(app.state.engine_client)
        if _SHARES_CORES:
            self._watch = supervise("core_sharing", partial(self._share_cores, app.state.engine_client))
        app.router.add_route(abort.PATH, Aborts(app.state.engine_client), methods=["POST"])
        app.middleware_stack = None  # vLLM has built it already; Starlette builds it again with ours
        app.add_middleware(Guard, key=engine_key(self._settings))
        return app

    async def _share_cores(self, engine: Any) -> None:
        """Lets the engine have the cores that are its to use, as replicas come and go."""
        config = engine.vllm_config.parallel_config
        if config.world_size > 1 or config.worker_cls != CPU_WORKER:
            return

        async def compute_on(cpus: list[int]) -> None:
            await engine.collective_rpc("compute_on", args=(cpus,))

        if not self._base:
            (self._base,) = await engine.collective_rpc("computes_on")
        await share_cores(Claims(), self._base, compute_on)

    def _take_share(self, llm_config: LLMConfig, *, keep_cache: bool) -> None:
        """Replicas on one machine without GPUs divide its cores and its memory; else each would plan to use all."""
        if _SHARES_CORES:
            bind(set())  # what the share is of
        share = machine_share(self._settings)
        if _SHARES_CORES and share.cpus != "auto":
            os.environ[CPU_BINDING] = share.cpus
            cores = {int(cpu) for cpu in share.cpus.split(",")}
            bind(cores)
            Claims().make(cores)
        if keep_cache:
            return
        machine = inspect_machine()
        machine = replace(machine, memory_available=min(machine.memory_available, share.memory))
        engine = self._settings.engine
        geometry = read_geometry(llm_config.get_engine_config().actual_hf_model_id, engine.dtype)
        if geometry is not None:
            context = engine.max_model_len or geometry.context
            demo = (self._settings.model or default_model(machine)) == DEMO
            cache = choose_kv_bytes(geometry, context, machine, engine.kv_cache_gib, demo=demo)
            llm_config.update_engine_kwargs(kv_cache_memory_bytes=cache)


def machine_share(settings: Settings) -> Share:
    """This replica's share, by its rank among the replicas of its machine."""
    context = serve.get_replica_context()
    nodes = sum(node["Alive"] and node["Resources"].get("CPU", 0) > 0 for node in ray.nodes())
    return share_of(inspect_machine(), context.rank.local_rank, context.world_size, nodes, settings)
