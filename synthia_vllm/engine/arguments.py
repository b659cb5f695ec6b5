"""vLLM's command line and environment from our settings and this machine."""

import json
import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from synthia_vllm.engine import fork_server
from synthia_vllm.engine.demo import NAME as DEMO_NAME
from synthia_vllm.engine.demo import demo_model
from synthia_vllm.engine.hardware import CPU_BINDING, Machine, preload_libraries, usable_cpus
from synthia_vllm.engine.memory import (
    Geometry,
    check_gpu_memory,
    choose_kv_bytes,
    in_float32,
    read_config,
    read_geometry,
)
from synthia_vllm.engine.plugin import ENGINE_VARIABLE
from synthia_vllm.engine.profiles import Profile, choose_profile
from synthia_vllm.errors import SetupError
from synthia_vllm.prompt import MAX_CLIENT_STOPS, MODEL_ALIASES, STOP_STRINGS, template_path
from synthia_vllm.settings import Settings

SYNTHIA = "migtissera/Synthia-v3.0-11B"
DEMO = "demo"
CPU_WORKER = "synthia_vllm.engine.cpu_worker.Worker"  # imports vLLM
# Most tokens of one step. A core computes some hundreds of them a second, and all streams wait for the step: at vLLM's
# 2048 a few prompts that come at once stop everybody for seconds. Matrices of 256 rows are as fast as larger ones.
CPU_BATCHED_TOKENS = 256
# vLLM options that this has to agree with: who gives one decides.
_CHOOSES_BATCH = ("--max-num-batched-tokens", "--max-num-seqs", "--no-enable-chunked-prefill")
_OPENMPS = ("libiomp", "libomp", "libgomp")  # Intel's, LLVM's and GNU's
# Set in a process that started itself anew, so that it does so once even where the loader ignores LD_PRELOAD.
_RESTARTED = "SYNTHIA_RESTARTED"

# Options that vLLM's parser takes and that nothing here would heed, and what to use instead. Source: vLLM 0.29,
# entrypoints/launchers/cli_args.py, FrontendArgs.
OF_VLLMS_SERVER: Mapping[str, str] = {
    "--(host|port|uds)": "give --host and --port before the --",
    "--api-key": "--access.mode keys, and `synthia-vllm keys create`",
    "--api-server-count": "--gateways N before the --",
    "--headless": "`synthia-vllm cluster up` starts engines on several machines",
    "--(allowed-.*|allow-credentials)": "--cors-origins",
    "--(ssl-.*|enable-ssl-refresh)": "TLS ends at a proxy in front, see docs/operations.md",
    "--(root-path|middleware|h11-.*)": "a proxy in front, see docs/operations.md",
    "--(uvicorn-log-level|disable-uvicorn-access-log|disable-access-log-for-endpoints|log-config-file)": "--log.…",
    "--chat-template(-content-format)?": "the template is the card's; --prompt.… changes it",
    "--lora-modules": "there is one model; leave it out",
    "--(enable-auto-tool-choice|tool-.*)": "the card's format has no tools; leave it out",
}


@dataclass
class EnginePlan:
    """How vLLM will be started: which model, with what arguments and environment."""

    model: str  # folder or hub id
    name: str  # what the model is served as, beside the aliases
    arguments: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    profile: str | None = None  # the one whose options are among the arguments, and which these are
    fork: bool = False  # vLLM's processes come of `engine.fork_server`

    def apply_environment(self) -> None:
        """Sets the environment for vLLM's processes. They are spawned, so even LD_PRELOAD takes effect in them.

        Where they are to bind themselves, this process is bound to what its container's quota lasts for: vLLM takes all
        CPUs of the affinity mask, which it inherits, and knows no quotas.
        """
        os.environ.update(self.environment)
        if self.environment.get(CPU_BINDING) == "auto" and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, usable_cpus())

    def prepare_processes(self) -> None:
        """Has vLLM start its processes as planned: in their environment, and forked where that is the plan.

        What forks them writes where this process writes by then.
        """
        self.apply_environment()
        if self.fork:
            fork_server.start()


def default_model(machine: Machine) -> str:
    """Synthia where there is a GPU, the demo model elsewhere."""
    return SYNTHIA if machine.gpus else DEMO


def find_model(asked: str) -> tuple[str, str]:
    """A model's folder or hub id, and its name to clients. Raises SetupError where the demo is missing."""
    if asked == DEMO:
        return str(demo_model()), DEMO_NAME
    return (str(Path(asked).expanduser()) if asked.startswith("~") else asked), asked


def plan_engine(settings: Settings, machine: Machine, extra: Sequence[str] = (), *, stages: int = 1) -> EnginePlan:
    """Decides everything about the engine before anything is loaded; `extra` are vLLM's own options, which win.

    Each of the pipeline's stages takes GPUs of a machine like this one. Raises SetupError where the model is missing,
    is no Llama architecture, or does not fit, and where an option is of vLLM's server, which is not what runs here.
    """
    _refuse_servers_options(extra)
    model, name = find_model(settings.model or default_model(machine))
    dtype, geometry = _dtype(settings, model, name, machine, extra)
    arguments = [
        *("--model", model),
        *("--served-model-name", name, *MODEL_ALIASES),
        *("--chat-template", str(template_path(settings.prompt.style))),
        *("--chat-template-content-format", "string"),
        # The sampling defaults are the contract's, not those of a generation_config.json.
        *("--generation-config", "vllm"),
        *("--dtype", dtype),
        "--enable-request-id-headers",
        "--enable-prompt-tokens-details",
    ]
    if not any(option.startswith("--structured-outputs-config") for option in extra):
        # vLLM's `auto` picks a backend for each request, and its engine keeps the first one's: a grammar for another
        # then fails after it was accepted.
        arguments += ["--structured-outputs-config.backend", "xgrammar"]
    if settings.prompt.turn_end:
        arguments += ["--default-chat-template-kwargs", json.dumps({"turn_end": settings.prompt.turn_end})]
    if settings.engine.max_model_len:
        arguments += ["--max-model-len", str(settings.engine.max_model_len)]
    environment = {
        ENGINE_VARIABLE: "1",
        # As vLLM's own server does. Forked, which is vLLM's default on a GPU, an engine would start amid this process's
        # threads, keep its listening socket, and load no plugin: nothing would tie it to the server.
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_MAX_STOP_STRINGS": str(len(STOP_STRINGS) + MAX_CLIENT_STOPS),
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }
    if settings.tracing.otlp_endpoint:
        arguments += ["--otlp-traces-endpoint", settings.tracing.otlp_endpoint]
        environment["OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"] = settings.tracing.protocol
    profile = choose_profile(settings.engine.profile, machine, read_config(model))
    if geometry:
        context = settings.engine.max_model_len or geometry.context
        if context > geometry.context:
            raise SetupError(f"--engine.max-model-len {context}: the model was made for {geometry.context} tokens")
    if machine.gpus:
        gpus = settings.engine.tensor_parallel_size or _most_gpus(len(machine.gpus), geometry.heads if geometry else 1)
        if gpus > len(machine.gpus):
            raise SetupError(f"--engine.tensor-parallel-size {gpus}: this machine has {len(machine.gpus)} GPU(s)")
        if geometry and not _smaller_weights(profile, extra):
            check_gpu_memory(geometry, context, machine, gpus, stages)
        arguments += ["--tensor-parallel-size", str(gpus), "--enable-prefix-caching"]
        arguments += ["--pipeline-parallel-size", str(stages)] if stages > 1 else []
        if settings.engine.kv_cache_gib:
            arguments += ["--kv-cache-memory-bytes", str(int(settings.engine.kv_cache_gib * 2**30))]
    else:
        if geometry:
            kv_bytes = choose_kv_bytes(geometry, context, machine, settings.engine.kv_cache_gib, demo=name == DEMO_NAME)
            arguments += ["--kv-cache-memory-bytes", str(kv_bytes)]
        arguments += _cpu_arguments(settings, extra)
        environment |= cpu_environment() | _without_compiler(settings)
    fork = _fork(settings, name, environment)
    taken = profile.arguments([*arguments, *extra]) if profile else []
    told = f"{profile.name}: {' '.join(taken) or 'nothing that was not given'}" if profile else None
    return EnginePlan(model, name, [*arguments, *taken, *extra], environment, told, fork)


def _dtype(
    settings: Settings, model: str, name: str, machine: Machine, extra: Sequence[str]
) -> tuple[str, Geometry | None]:
    """What the engine computes in, and the model's sizes in that.

    float32 on a CPU that takes 16-bit numbers apart before it computes, where a model in it fits; else as asked.

    Measured with the demo model on two cores with AVX2: about three times the tokens a second with 64 streams, and more
    with 8; one stream alone is slower, since it waits for memory (`benchmarks/results/cpu_dtype.json`).
    """
    asked = settings.engine.dtype
    geometry = read_geometry(model, asked)
    told = any(word.startswith(("--dtype", "--quantization")) for word in extra)
    if geometry is None or asked != "auto" or machine.gpus or machine.half_precision or told:
        return asked, geometry
    config = read_config(model) or {}  # where a hub's is, once its sizes are known
    if "quantization_config" in config or geometry.weight_bytes is None:
        return asked, geometry
    if str(config.get("dtype") or config.get("torch_dtype")).endswith("float32"):
        return asked, geometry
    doubled = in_float32(geometry)
    try:
        context = settings.engine.max_model_len or doubled.context
        choose_kv_bytes(doubled, context, machine, settings.engine.kv_cache_gib, demo=name == DEMO_NAME)
    except SetupError:
        return asked, geometry
    return "float32", doubled


def _fork(settings: Settings, name: str, environment: Mapping[str, str]) -> bool:
    """Of the OpenMPs, Intel's can be forked and told anew what to do; without it there is no forking."""
    asked = settings.engine.fork
    can = "libiomp5" in environment.get("LD_PRELOAD", "")
    if asked and not can:
        raise SetupError("--engine.fork: for CPUs with Intel's OpenMP (the package intel-openmp) alone; leave it out")
    return can and (name == DEMO_NAME if asked is None else asked)


def _refuse_servers_options(extra: Sequence[str]) -> None:
    for word in extra:
        name = word.partition("=")[0].replace("_", "-")
        cure = next((cure for start, cure in OF_VLLMS_SERVER.items() if re.fullmatch(start, name)), None)
        if cure:
            raise SetupError(f"-- {name}: it is of vLLM's server, which is not what runs here: {cure}")


def _cpu_arguments(settings: Settings, extra: Sequence[str]) -> list[str]:
    arguments = ["--worker-cls", CPU_WORKER]
    if not settings.engine.compile:
        arguments.append("--enforce-eager")
    if not any(option.startswith(_CHOOSES_BATCH) for option in extra):
        arguments += ["--max-num-batched-tokens", str(CPU_BATCHED_TOKENS)]
    return arguments


def _without_compiler(settings: Settings) -> dict[str, str]:
    """vLLM's sampler for CPUs is compiled by torch even in eager mode; where nothing compiles, it has to run as it is.

    Raises SetupError where compiling was asked for. The name is torch's (`torch._inductor.config.cpp.cxx`).
    """
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler):
        return {}
    if settings.engine.compile:
        raise SetupError(f"--engine.compile: no C++ compiler here ({compiler}); apt-get install g++, or leave it out")
    return {"TORCHDYNAMO_DISABLE": "1"}


def _smaller_weights(profile: Profile | None, extra: Sequence[str]) -> bool:
    """Quantized while they are loaded: the files' size says too much."""
    return "--quantization" in extra or (profile is not None and "quantization" in profile.options)


def cpu_environment() -> dict[str, str]:
    """What makes vLLM's CPU worker fast: threads bound to all cores, and tcmalloc and Intel's OpenMP preloaded.

    An OpenMP that the caller preloads already is kept instead.

    Source: vLLM's CPU installation page, *set LD_PRELOAD* and *VLLM_CPU_NUM_OF_RESERVED_CPU*.
    """
    given = os.environ.get("LD_PRELOAD", "")
    libraries = preload_libraries()
    if any(openmp in given for openmp in _OPENMPS):
        del libraries["libiomp5"]  # vLLM starts with one of them alone
    missing = [str(path) for path in libraries.values() if path and str(path) not in given]
    return {
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        CPU_BINDING: os.environ.get(CPU_BINDING, "auto"),
        # Intel's OpenMP: a thread that waits for the others does not give its core away meanwhile. Whoever else wants
        # it keeps it for milliseconds, hundreds of times a step: a busy process made steps five times longer.
        "KMP_USE_YIELD": os.environ.get("KMP_USE_YIELD", "0"),
        "LD_PRELOAD": ":".join([*missing, *([given] if given else [])]),
    }


def preload_once(machine: Machine) -> None:
    """Starts this process anew with the preloaded libraries, if it has no GPU and runs without them.

    The worker would have them anyway, being spawned; this is for the HTTP server, which shares its cores.
    """
    wanted = cpu_environment()["LD_PRELOAD"]
    if machine.gpus or _RESTARTED in os.environ or wanted == os.environ.get("LD_PRELOAD", ""):
        return
    os.execve(sys.executable, sys.orig_argv, {**os.environ, "LD_PRELOAD": wanted, _RESTARTED: "1"})


def _most_gpus(count: int, heads: int) -> int:
    """The most GPUs that divide the attention heads evenly."""
    return next(gpus for gpus in range(count, 0, -1) if heads % gpus == 0)
