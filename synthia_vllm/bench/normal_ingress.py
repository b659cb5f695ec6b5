"""Ray Serve LLM's normal ingress (`OpenAiIngress`) in front of the replicas that the cluster has: a peer to measure.

A Serve application of its own beside the two of ours; requests go by Serve's handles to the same engine replicas, with
Ray's own defaults.
"""

from typing import Any

from ray import serve
from ray.llm._internal.serve.core.configs.openai_api_models import ModelCard
from ray.llm._internal.serve.core.ingress.ingress import OpenAiIngress, make_fastapi_ingress

from synthia_vllm.cluster.config import ENGINE, ENGINE_DEPLOYMENT

ROUTE = "/normal"


def application(args: dict[str, Any]) -> serve.Application:
    model = args["model"]
    card = ModelCard(id=model, object="model", owned_by="peer", permission=[], metadata={})
    options = {**OpenAiIngress.get_deployment_options([]), "ray_actor_options": {"num_cpus": 0}}
    options.pop("autoscaling_config")
    handle = serve.get_deployment_handle(ENGINE_DEPLOYMENT, ENGINE)
    deployment = serve.deployment(make_fastapi_ingress(OpenAiIngress), num_replicas=2, **options)
    return deployment.bind(llm_deployments={model: handle}, model_cards={model: card})


def as_config(model: str) -> dict[str, Any]:
    """Its part of a Serve config."""
    return {
        "name": "normal",
        "route_prefix": ROUTE,
        "import_path": "synthia_vllm.bench.normal_ingress:application",
        "args": {"model": model},
    }
