"""The application of slow_app on nodes of engines, as our gateways are; built, where asked for, as engines are."""

from ray.serve import Application

from synthia_vllm.settings import Settings
from tests.cluster.slow_app import Slow


def app(arguments: dict[str, str]) -> Application:
    """With an accelerator, waits for its nodes as an engine's builder does in a pod, whose settings name it."""
    if accelerator := arguments.get("accelerator"):
        from synthia_vllm.cluster.engine_app import engine_machines  # brings vLLM

        engine_machines(Settings(model="demo", cluster={"accelerator": accelerator}))
    return Slow.options(ray_actor_options={"num_cpus": 0, "label_selector": {"ray.io/node-group": "engines"}}).bind()
