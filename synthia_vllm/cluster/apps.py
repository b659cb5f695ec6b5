"""The two Ray Serve applications, as a Serve config names them. Called in a process of the cluster.

Each takes `{"settings": …}`, the settings tree as far as it differs from the defaults. What a config must not hold, the
secrets, is in the environment of Ray's nodes.
"""

from collections.abc import Mapping
from typing import Any

from ray.serve import Application

from synthia_vllm.settings import settings_of


def engine(args: Mapping[str, Any]) -> Application:
    """vLLM replicas behind `ray.serve.llm` with direct streaming; `vllm_options` go to vLLM as they are.

    Raises SetupError where Ray lacks the environment, or the model is missing or does not fit; Serve shows the text.
    """
    from synthia_vllm.cluster.config import check_environment
    from synthia_vllm.cluster.engine_app import build_engine

    settings = settings_of(args.get("settings", {}))
    check_environment(settings)
    return build_engine(settings, args.get("vllm_options", ()))


def gateway(args: Mapping[str, Any]) -> Application:
    """The single machine's gateway with the engine application's replicas as its upstream."""
    from synthia_vllm.cluster.gateway_app import build_gateway

    return build_gateway(settings_of(args.get("settings", {})))
