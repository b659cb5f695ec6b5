"""A rival of our gateway, for tests: a reverse proxy that passes on what it gets, and knows `/readiness`.

python -m tests.bench.passing_on --upstream URL --host HOST --port N
"""

import click
import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route


def passing_on(upstream: str) -> Starlette:
    client = httpx.AsyncClient(base_url=upstream, timeout=None, trust_env=False)

    async def ready(request: Request) -> Response:
        return Response()

    async def forward(request: Request) -> Response:
        sent = client.build_request(
            request.method, request.url.path, content=await request.body(), headers={"content-type": "application/json"}
        )
        reply = await client.send(sent, stream=True)
        return StreamingResponse(
            reply.aiter_raw(),
            reply.status_code,
            media_type=reply.headers["content-type"],
            background=BackgroundTask(reply.aclose),
        )

    return Starlette(routes=[Route("/readiness", ready), Route("/{path:path}", forward, methods=["GET", "POST"])])


@click.command()
@click.option("--upstream", required=True)
@click.option("--host", required=True)
@click.option("--port", type=int, required=True)
def main(upstream: str, host: str, port: int) -> None:
    uvicorn.run(passing_on(upstream), host=host, port=port, log_level="warning")


if __name__ == "__main__":
    main()
