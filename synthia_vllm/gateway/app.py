"""The stack: what every request passes on its way to an engine, outermost layer first."""

from starlette.types import ASGIApp

from synthia_vllm.gateway.contract import Contract
from synthia_vllm.gateway.routes import Routes
from synthia_vllm.settings import Settings


def build_gateway(upstream: ASGIApp, settings: Settings) -> ASGIApp:
    """Our layers around an upstream, itself an ASGI app (vLLM's own, or a proxy to replicas)."""
    contract = Contract(upstream, role_markers=settings.prompt.role_markers, max_body_bytes=settings.max_body_bytes)
    return Routes(contract)
